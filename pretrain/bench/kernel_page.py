"""The pages of `farspan bench kernels`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .about import bullets
from .kernel_cases import BACKWARD, BOTH, FORWARD, TORCH, Case
from .kernel_measure import COMPILED, DIFFERS, LAUNCHES, PEAK, REFERENCE, SAVED, WAITS, Row, cpu_ratio, cpu_seconds

NOT_MEASURED, NONE = "not measured", "–"
GPU_PAGE, CPU_PAGE = "kernels", "kernels_cpu"
PASSES = (FORWARD, BACKWARD, BOTH)
COMMAND = "farspan bench kernels --out benchmarks --replace"


def gpu_lines(results: dict[str, Any], cases: Sequence[Case]) -> list[str]:
    """The page in Markdown; ``results`` as in kernels.json, without rows where nothing was measured."""
    rows = {(row["title"], row["shape"]): row for row in results["rows"]}
    lines = ["# Operations on a GPU", ""]
    if not rows:
        lines += ["| operation | what | target | measured |", "|---|---|---|---|"]
        for case in cases:
            for quantity, target in _asked(case):
                lines.append(f"| {case.title}, {case.shape} | {quantity} | {target} | {NOT_MEASURED} |")
        return [*lines, "", f"`{COMMAND}`, on a machine with a GPU."]
    ceilings = results["ceilings"]
    lines += [
        "Each call was compared with float64 first. Times: medians by events over graphs of many calls, inputs and",
        "results rotated through several times the L2 cache. Floor: every input read and every result written once at",
        f"the rate of a copy ({ceilings['copy'] / 1e12:.2f} TB/s here), or its products at that of a matrix product",
        f"({ceilings['matmul'] / 1e12:.0f} TFLOP/s of bfloat16 here), whichever takes longer. The targets are for one",
        f"H200. `{COMMAND}`",
        "",
        *bullets(results["about"]),
        "",
        "| operation | what | target | measured | target / measured | of the floor | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        lines += _own_lines(case, rows.get((case.title, case.shape)), ceilings)
    lines += ["", "| operation | pass | beside | its time | Farspan is faster by | asked | verdict |", "|---" * 7 + "|"]
    for case in cases:
        lines += _peer_lines(case, rows.get((case.title, case.shape)))
    lines += [
        "",
        "| operation | form | relative error, largest (allowed) | two runs | graph |",
        "|---|---|---|---|---|",
    ]
    for case in cases:
        lines += _check_line(case, rows.get((case.title, case.shape)))
    return lines


def _asked(case: Case) -> Iterator[tuple[str, str]]:
    """(what, target) of everything that is asked of a case; its forward and backward pass where nothing is."""
    for goal in case.goals:
        yield goal.quantity, _amount(goal.quantity, goal.most, at_most=True)
    for against in case.against:
        yield f"{against.quantity}, against {against.peer}", f"≥ {against.least:g}×"
    if not case.goals and not case.against:
        yield BOTH, NONE


def _own_lines(case: Case, row: Row | None, ceilings: dict[str, float]) -> Iterator[str]:
    goals = {goal.quantity: goal.most for goal in case.goals}
    beside = [q for q in (LAUNCHES, PEAK, SAVED, WAITS, DIFFERS) if q in goals]
    for quantity in (*PASSES, *beside):
        target, value = goals.get(quantity), measured(row, quantity)
        cells = [f"{case.title}, {case.shape}", quantity]
        cells.append(NONE if target is None else _amount(quantity, target, at_most=True))
        cells.append(_failure(row) if value is None else _amount(quantity, value))
        if quantity == PEAK and row is not None and value is not None:
            cells[-1] += f", gradients {row['beside']['gradients'] / 1e6:.1f} MB of it"
        cells.append(NONE if not target or not value else f"{target / value:.2f}")
        work = case.work(quantity)
        cells.append(NONE if not value or work is None else f"{work.seconds(ceilings) / value:.0%}")
        cells.append(verdict(row, value, target))
        yield _line(cells)


def _peer_lines(case: Case, row: Row | None) -> Iterator[str]:
    if row is None:
        return
    for peer, found in row.get("peers", {}).items():
        asked = {a.quantity: a.least for a in case.against if a.peer == peer}
        shown = sorted({*asked, FORWARD, BACKWARD}, key=PASSES.index)
        if "why" in found:
            name, least = f"{case.title}, {case.shape}", min(asked.values(), default=None)
            yield _line([name, NONE, peer, NONE, NONE, _times(least), found["why"]])
            continue
        for quantity in shown:
            ours, theirs = measured(row, quantity), found["measured"][quantity]["seconds"]
            times, least = (None if ours is None else theirs / ours), asked.get(quantity)
            judged = NONE if least is None else "met" if times is not None and times >= least else "missed"
            cells = [
                f"{case.title}, {case.shape}",
                quantity,
                peer,
                _amount(quantity, theirs),
                _times(times),
                _times(least),
            ]
            yield _line([*cells, judged])


def _check_line(case: Case, row: Row | None) -> Iterator[str]:
    if row is None or "check" not in row:
        yield _line([f"{case.title}, {case.shape}", NONE, _failure(row), NONE, NONE])
        return
    check = row["check"]
    where = "" if check["shape"] == case.shape else f" at {check['shape']}"
    error = f"{max(check['errors'].values()):.1e} ({check['allowed']:.0e}){where}"
    equal = "equal bits" if check["runs_equal"] else "differ"
    passes = row.get("measured", {}).values()
    captured = (
        "captured" if passes and all(p["captured"] for p in passes) else "launched by the host" if passes else NONE
    )
    yield _line([f"{case.title}, {case.shape}", row.get("form", NONE), error, equal, captured])


def measured(row: Row | None, quantity: str) -> float | None:
    """Seconds of a pass, or another number, where it was measured."""
    if row is None:
        return None
    if quantity in PASSES:
        found = row.get("measured", {}).get(quantity)
        return None if found is None else float(found["seconds"])
    if quantity == DIFFERS:
        return float(not row["check"]["runs_equal"]) if "check" in row else None
    value = row.get("beside", {}).get(quantity)
    return None if value is None else float(value)


def verdict(row: Row | None, value: float | None, target: float | None) -> str:
    """met, or missed and by how much; what is wrong counts as nothing, whatever it takes."""
    if row is not None and not row.get("check", {}).get("right", True):
        return "wrong results"
    if target is None:
        return NONE
    if value is None:
        return NOT_MEASURED
    if value <= target:
        return "met"
    return f"missed, {value / target:.2f} times the target" if target else "missed"


def _failure(row: Row | None) -> str:
    if row is None:
        return NOT_MEASURED
    if "failed" in row:
        return f"failed: {row['failed']}"
    return "wrong results" if not row.get("check", {}).get("right", True) else NOT_MEASURED


def cpu_lines(results: dict[str, Any]) -> list[str]:
    """The page in Markdown; ``results`` as in kernels_cpu.json."""
    lines = [
        "# Operations on a CPU",
        "",
        "The reference in PyTorch, the compiled form in C++ where the operation has one, and torch's own operation.",
        "Each was compared with float64 first. Medians; the sides ran in turn, and ratios are medians over the rounds.",
        f"Forward without gradients. `{COMMAND} --device cpu`",
        "",
    ]
    if not results["rows"]:
        return [*lines, f"{NOT_MEASURED.capitalize()}."]
    lines += [
        *bullets(results["about"]),
        "",
        "| operation, float32 | pass | reference | compiled | torch's own | reference / compiled | torch / best |",
        "|---" * 7 + "|",
    ]
    notes = []
    for row in results["rows"]:
        name = f"{row['title']}, {row['shape']}"
        if "sides" not in row:
            lines.append(_line([name, NONE, _failure(row), *[NONE] * 4]))
            continue
        (own,) = [side for side in row["sides"] if side not in (REFERENCE, COMPILED)] or [None]
        best = COMPILED if COMPILED in row["sides"] else REFERENCE
        for quantity in (FORWARD, BOTH):
            seconds = (cpu_seconds(row, side, quantity) if side else None for side in (REFERENCE, COMPILED, own))
            cells = [NONE if s is None else _amount(quantity, s) for s in seconds]
            ratios = [
                cpu_ratio(row, quantity, COMPILED, REFERENCE),
                cpu_ratio(row, quantity, best, own) if own else None,
            ]
            lines.append(_line([name, quantity, *cells, *map(_times, ratios)]))
        if own not in (None, TORCH):
            notes.append(f"{row['title']}: {own}")
    if notes:
        lines += ["", f"Torch's own, where it is not the same by name: {'; '.join(notes)}."]
    lines += ["", "| operation | form by default | relative error, largest (allowed) | two runs |", "|---|---|---|---|"]
    for row in results["rows"]:
        if check := row.get("check"):
            error = f"{max(check['errors'].values()):.1e} ({check['allowed']:.0e})"
            equal = "equal bits" if check["runs_equal"] else "differ"
            lines.append(_line([f"{row['title']}, {row['shape']}", row["form"], error, equal]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.2f}×" if ratio < 100 else f"{ratio:.0f}×"


def _amount(quantity: str, value: float, *, at_most: bool = False) -> str:
    sign = "≤ " if at_most and value else ""
    if quantity in PASSES:
        return sign + (f"{value * 1e6:.1f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms")
    if quantity in (PEAK, SAVED):
        return sign + f"{value / 1e6:,.1f} MB" if value else "none"
    if quantity in (WAITS, DIFFERS):
        return "yes" if value else "no"
    return sign + f"{value:.0f}"
