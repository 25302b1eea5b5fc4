"""The results as a page, as numbers and as a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import parents_of, replacing, write_json, write_text
from .methods import Method

FILES = ("approximation.md", "approximation.json", "approximation.png")
NO_PLOT = "no plot: pip install matplotlib"
COLOURS = {"exact": "black", "MRA-2": "tab:blue", "MRA-2-s": "tab:green", "Nyström": "tab:red"}


def lines_of(results: dict[str, Any]) -> list[str]:
    """The page, in Markdown."""
    return [
        "# MRA-2 and Nyström attention against exact attention",
        "",
        "Error: the Frobenius norm of the difference from the output of exact softmax attention over the norm of that",
        "output, of every head of every layer and row by itself, then their mean. Attention alone, without",
        "Nyströmformer's convolution. With every block selected MRA is computed as exact attention.",
        "Time (median, with one thread of the process's own time) and peak memory (what a pass forward and backward",
        "adds in a fresh process): one row, all heads of one layer, float32, in the same run.",
        "",
        *(f"- {name}: {value}" for name, value in results["about"].items()),
        "",
        *_by_length(results),
        "",
        *_everything(results),
    ]


def _by_length(results: dict[str, Any]) -> list[str]:
    lengths = _lengths(results)
    lines = [
        f"| error by length | {' | '.join(f'{length:,}' for length in lengths)} |",
        "|---" * (1 + len(lengths)) + "|",
    ]
    for name, points in series_by_length(results):
        errors = {p["length"]: f"{p['error']:.3f}" for p in points}
        lines.append(f"| {name} | {' | '.join(errors.get(length, '–') for length in lengths)} |")
    return lines


def _everything(results: dict[str, Any]) -> list[str]:
    with_authors = any(p["authors_error"] is not None for p in results["points"])
    columns = ["length", "method", "budget", "of all", "error"]
    columns += ["the authors' error"] if with_authors else []
    columns += ["forward, ms", "forward and backward, ms", "peak memory, MiB"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for p in results["points"]:
        cells = [
            f"{p['length']:,}",
            p["method"],
            Method(p["method"], p["budget"]).amount,
            f"{p['share']:.1%}",
            f"{p['error']:.3f}",
        ]
        cells += [_shown(p["authors_error"], 1, ".3f")] if with_authors else []
        cells += [_shown(p[name], 1e3, ",.1f") for name in ("forward_seconds", "forward_and_backward_seconds")]
        cells.append(_shown(p["peak_memory_bytes"], 2**-20, ",.0f"))
        lines.append(f"| {' | '.join(cells)} |")
    if with_authors:
        lines += [
            "",
            "The authors' errors are those of MRA's released profile (arXiv 2207.10284), on inputs of theirs. The",
            "numbers of the synthetic model here were chosen to come near (`pretrain/approximation/synthetic.py`).",
        ]
    return lines


def _shown(value: float | None, factor: float, form: str) -> str:
    return "–" if value is None else format(value * factor, form)


def series_by_length(results: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The points of MRA at the fixed share of blocks, and of Nyström attention at every number of landmarks."""
    for kind in ("MRA-2", "MRA-2-s"):
        points = [p for p in results["points"] if p["method"] == kind and p["at_fixed_share"]]
        yield f"{kind}, {results['share']:.4g} of all blocks", points
    of_nystrom = [p for p in results["points"] if p["method"] == "Nyström"]
    for landmarks in sorted({p["budget"] for p in of_nystrom}):
        yield f"Nyström, {landmarks} landmarks", [p for p in of_nystrom if p["budget"] == landmarks]


def write(results: dict[str, Any], folder: Path) -> str | None:
    """Write the files of ``FILES``, each whole; returns what is to be said about them, if anything."""
    picture = plot(results)
    with parents_of(folder / FILES[0]):
        text = lines_of(results) + (["", f"![The same as curves]({FILES[2]})"] if picture else [])
        write_text(folder / FILES[0], "\n".join(text) + "\n")
        write_json(folder / FILES[1], results)
        if picture:
            with replacing(folder / FILES[2]) as file:
                file.write(picture)
            return None
    (folder / FILES[2]).unlink(missing_ok=True)  # of other results
    return NO_PLOT


def plot(results: dict[str, Any]) -> bytes | None:
    """The picture as PNG; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    timed = any(p["forward_seconds"] is not None for p in results["points"])
    figure = Figure(figsize=(12, 10 if timed else 5), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2 if timed else 1, 2, squeeze=False).flatten()
    _plot_by_budget(axes[0], results)
    _plot_by_length(axes[1], results)
    if timed:
        _plot_cost(axes[2], results, "forward_and_backward_seconds", 1, "seconds", "Time, forward and backward")
        _plot_cost(axes[3], results, "peak_memory_bytes", 2**-20, "MiB", "Peak memory, forward and backward")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _plot_by_budget(axis: Any, results: dict[str, Any]) -> None:
    lengths = _lengths(results)
    for kind in ("MRA-2", "MRA-2-s", "Nyström"):
        for i, length in enumerate(lengths):
            points = [p for p in results["points"] if (p["method"], p["length"]) == (kind, length)]
            points.sort(key=lambda p: p["share"])
            shade = 0.35 + 0.65 * (i + 1) / len(lengths)
            _curve(axis, points, "share", "error", f"{kind}, {length:,}", COLOURS[kind], shade)
        known = [p for p in results["points"] if p["method"] == kind and p["authors_error"] is not None]
        if known:
            x, y = [p["share"] for p in known], [p["authors_error"] for p in known]
            axis.plot(
                x, y, "D", color=COLOURS[kind], markerfacecolor="none", label=f"{kind}, {known[0]['length']}, authors"
            )
    _finish(axis, "share of blocks, or landmarks for each token", "relative error", "Error by budget")


def _plot_by_length(axis: Any, results: dict[str, Any]) -> None:
    series = [(name, points) for name, points in series_by_length(results) if points]
    for i, (name, points) in enumerate(series):
        kind = points[0]["method"]
        shade = 0.3 + 0.7 * i / len(series) if kind == "Nyström" else 1
        _curve(axis, points, "length", "error", name, COLOURS[kind], shade)
    axis.set_ylim(bottom=0)
    _finish(axis, "tokens", "relative error", "Error by length", ticks=_lengths(results))


def _plot_cost(axis: Any, results: dict[str, Any], key: str, factor: float, unit: str, title: str) -> None:
    """Without MRA-2-s, which costs about what MRA-2 does, and without budgets of everything."""
    series: dict[Method, list[dict[str, Any]]] = {}
    for p in results["points"]:
        if p[key] and p["method"] != "MRA-2-s" and (p["share"] < 1 or p["method"] == "exact"):
            series.setdefault(Method(p["method"], p["budget"]), []).append({**p, key: p[key] * factor})
    for method, points in series.items():
        budgets = sorted(other.budget for other in series if other.kind == method.kind)
        shade = 0.35 + 0.65 * (budgets.index(method.budget) + 1) / len(budgets)
        _curve(axis, points, "length", key, method.name, COLOURS[method.kind], shade)
    axis.set_yscale("log")
    _finish(axis, "tokens", unit, title, ticks=_lengths(results))


def _lengths(results: dict[str, Any]) -> list[int]:
    return sorted({p["length"] for p in results["points"]})


def _curve(axis: Any, points: list[dict[str, Any]], x: str, y: str, name: str, colour: str, shade: float) -> None:
    axis.plot([p[x] for p in points], [p[y] for p in points], "o-", color=colour, alpha=min(shade, 1), label=name)


def _finish(axis: Any, x: str, y: str, title: str, ticks: list[int] | None = None) -> None:
    axis.set_xscale("log", base=2)
    if ticks is not None:
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small", ncols=2)
