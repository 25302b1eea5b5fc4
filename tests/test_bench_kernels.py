"""``farspan bench kernels``: numbers from made-up timings, what counts as wrong, pages, the command from end to end."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from farspan.launch.cli import main
from farspan.pretrain.bench import kernel_measure, timing
from farspan.pretrain.bench.kernel_cases import (
    BACKWARD,
    BOTH,
    FORWARD,
    TORCH,
    Against,
    Case,
    Goal,
    Work,
    convolution_by_fft,
    layer_norm_case,
    mra_case,
)
from farspan.pretrain.bench.kernel_list import cases
from farspan.pretrain.bench.kernel_measure import check, collect, cpu_ratio, measure, measure_apart, on_gpu
from farspan.pretrain.bench.kernel_page import cpu_lines, gpu_lines, measured, verdict
from farspan.pretrain.bench.kernel_peers import FAST, FFT, FLASH_FFT, MRA_KERNELS, Missing, Peer, Ready, peers_of

CPU = torch.device("cpu")
CEILINGS = {"copy": 4.3e12, "matmul": 790e12}


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The references: nothing is compiled here."""
    monkeypatch.setenv("FARSPAN_KERNELS", "reference")
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def norm_case(**changes: Any) -> Case:
    return dataclasses.replace(layer_norm_case(16, 64, torch.float32), **changes)


# Numbers.


def test_medians_and_percentiles() -> None:
    found = timing.Timing.of([5.0, 1.0, 2.0, 3.0, 100.0], captured=True)
    assert (found.seconds, found.low, found.high, found.rounds, found.captured) == (3.0, 1.0, 100.0, 5, True)


def test_ratios_are_medians_over_rounds() -> None:
    assert timing.ratio([2.0, 9.0, 40.0], [1.0, 3.0, 10.0]) == 3.0
    row = {"sides": {"reference": {FORWARD: [2.0, 9.0, 40.0]}, "compiled": {FORWARD: [1.0, 3.0, 10.0]}}}
    assert cpu_ratio(row, FORWARD, "compiled", "reference") == 3.0
    assert cpu_ratio(row, FORWARD, "torch", "reference") is None


def test_the_floor_is_the_slower_of_bytes_and_products() -> None:
    assert Work(4.3e12, 79e12).seconds(CEILINGS) == pytest.approx(1.0)
    assert Work(4.3e9, 790e12).seconds(CEILINGS) == pytest.approx(1.0)
    assert Work(1.0, 2.0) + Work(3.0, 4.0) == Work(4.0, 6.0)


def test_targets_of_the_gpu_are_physically_sound() -> None:
    """By hand, [8192, 1024] in bfloat16 has 16.8 MB; and no target lies below its floor."""
    found = {case.name: case for case in cases("cuda")}
    tensor = 8192 * 1024 * 2
    fused = found["dropout + add + LayerNorm [8192, 1024]"]
    assert (fused.forward.bytes, fused.backward.bytes) == (4 * tensor + 8 * 8192, 5 * tensor + 8 * 8192)
    assert fused.backward.seconds(CEILINGS) / 23e-6 == pytest.approx(0.85, abs=0.005)
    assert 0.85 < fused.forward.seconds(CEILINGS) / 17.5e-6 < 0.91
    alone = found["LayerNorm [8192, 1024]"]
    assert (alone.forward.bytes, alone.backward.bytes) == (2 * tensor, 3 * tensor)
    for case in found.values():
        for goal in case.goals:
            if (work := case.work(goal.quantity)) is not None:
                assert work.seconds(CEILINGS) < goal.most, (case.name, goal)


def test_products_of_mra_by_hand() -> None:
    """One row of one head: two rows of blocks with two exact blocks each (all of them), and the four pairs of means."""
    case = mra_case(1, 1, 64, 16, 2, torch.float32)
    assert case.forward.flops == 2 * 2 * 16 * (4 * 32 * 32 + 4)


def test_rotated_inputs_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 60 * 2**20)
    for size in (1, 10**6, 33 * 10**6, 10**9):
        sets = timing.sets_for(size, torch.device("cuda"))
        assert sets == timing.MOST_SETS or sets * size >= 4 * 60 * 2**20
        assert sets >= 2
    assert timing.sets_for(10**9, CPU) == 2


def test_sides_take_turns() -> None:
    called: list[str] = []

    def side(name: str) -> Callable[[int], object]:
        def call(i: int) -> None:
            called.append(name)
            time.sleep(0.011)

        return call

    found = timing.in_turn({"a": side("a"), "b": side("b")}, 2, seconds=0.0, least=4)
    assert {name: len(rounds) for name, rounds in found.items()} == {"a": 4, "b": 4}
    assert "".join(called[-8:]) == "abbaabba"
    assert all(0.011 <= seconds < 0.1 for seconds in found["a"])


# Right and wrong.


@pytest.mark.parametrize("case", cases("cpu", quick=True), ids=lambda case: case.operation + " " + case.title)
def test_every_case_is_right_and_its_own_form_computes_the_same(case: Case) -> None:
    found = check(case, CPU, seed=3)
    assert found["right"] and found["runs_equal"], found
    problem = case.make(4, CPU)
    assert not torch.equal(problem.inputs[problem.learnt[0]], case.make(5, CPU).inputs[problem.learnt[0]])
    if case.own is not None and case.own_is_same:
        for ours, own in zip(case.call(problem.inputs), case.own(problem.inputs), strict=True):
            torch.testing.assert_close(own, ours, rtol=1e-4, atol=1e-5)


def test_the_convolution_by_hand() -> None:
    """Every lag of both directions, summed up in a loop."""
    (case,) = (c for c in cases("cpu", quick=True) if c.operation == "ema")
    inputs = case.make(1, CPU).to(torch.float64).inputs
    (found,) = convolution_by_fft(inputs)
    d, t = 3, 20
    expected = 0.0
    for direction, sign in ((0, 1), (1, -1)):
        p = torch.sigmoid(inputs["damping"][direction, d])
        q = 1 - torch.sigmoid(inputs["decay"][direction, d]) * p
        weights = inputs["projection"][direction, d] * p * inputs["expansion"][direction, d] / len(p) ** 0.5
        for lag in range(len(found)):
            if 0 <= (at := t - sign * lag) < len(found):
                expected += ((weights * q**lag).sum() * inputs["x"][at, 0, d]).item()
    assert found[t, 0, d].item() == pytest.approx(expected, rel=1e-5)


def test_what_is_wrong_is_not_timed() -> None:
    case = norm_case()
    # The truth is the same function in float64: spoil the other alone.
    wrong = norm_case(call=lambda t: tuple(y if y.dtype == torch.float64 else y * 1.001 for y in case.call(t)))
    row = measure(wrong, CPU, 0.01)
    assert not row["check"]["right"] and "sides" not in row
    assert max(row["check"]["errors"].values()) == pytest.approx(1e-3, rel=0.1)
    assert "wrong results" in "\n".join(cpu_lines({"about": {}, "rows": [row]}))
    assert verdict(row, 1e-6, 2e-6) == "wrong results"


def test_results_that_are_no_numbers_are_wrong() -> None:
    row = measure(norm_case(call=lambda t: (t["x"] * t["weight"] * t["bias"] * float("nan"),)), CPU, 0.01)
    assert not row["check"]["right"]


def test_a_failing_case_is_a_row() -> None:
    def fails(t: Any) -> Any:
        raise RuntimeError("no such\nkernel")

    row = measure(norm_case(call=fails), CPU, 0.01)
    assert row["failed"] == "no such kernel"
    assert "failed: no such kernel" in "\n".join(cpu_lines({"about": {}, "rows": [row]}))


# A process of its own.


def apart(work: Callable[[Connection], None], limit: float) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender,), daemon=True)
    process.start()
    sender.close()
    row = collect(receiver, process, {}, limit)
    assert not process.is_alive()
    return row


def test_a_crash_costs_no_more_than_what_follows_it() -> None:
    def work(sender: Connection) -> None:
        sender.send(("form", "compiled"))
        sender.send(("peers", {"a": {"why": "x"}}))
        sender.send(("peers", {"b": {"why": "y"}}))
        os._exit(7)

    row = apart(work, 20)
    assert row["form"] == "compiled" and set(row["peers"]) == {"a", "b"}
    assert "ended with 7" in row["failed"]


def test_what_never_ends_is_ended() -> None:
    began = time.monotonic()
    assert "nothing came for 0 s" in apart(lambda sender: time.sleep(60), 0.2)["failed"]
    assert time.monotonic() - began < 10


def test_a_case_in_a_process_of_its_own() -> None:
    name = next(case.name for case in cases("cpu", quick=True) if case.title == "LayerNorm")
    row = measure_apart(name, CPU, 0.02, True, 60.0)
    assert "failed" not in row and row["check"]["right"]
    assert all(seconds > 0 for side in row["sides"].values() for seconds in side[FORWARD] + side[BOTH])


# Peers.


@pytest.mark.parametrize("name", [FAST, FFT, FLASH_FFT, MRA_KERNELS])
def test_peers_that_are_not_here_say_so(name: str) -> None:
    (case, peer) = next((c, p) for c in cases("cuda") for p in peers_of(c) if p.name == name)
    with pytest.raises(Missing, match=r"not installed|not in transformers|not built its kernels"):
        peer.find(case)


def test_every_peer_that_something_is_asked_against_exists() -> None:
    for case in cases("cuda"):
        assert {against.peer for against in case.against} <= {peer.name for peer in peers_of(case)}


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks a GPU answers with numbers of its own; the calls are made."""
    counter = iter(range(1, 1000))

    def device_time(call: timing.Call, sets: int, *, seconds: float) -> timing.Timing:
        for i in range(sets):
            call(i)
        return timing.Timing(next(counter) * 1e-6, 0.0, 0.0, 9, captured=True)

    monkeypatch.setattr(timing, "device_time", device_time)
    monkeypatch.setattr(timing, "launches", lambda call: 1)
    monkeypatch.setattr(timing, "added_memory", lambda call: 123)
    monkeypatch.setattr(timing, "synchronises", lambda call: False)
    monkeypatch.setattr(timing, "own_stream", lambda: torch.autograd.profiler.record_function("own stream"))


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("case", cases("cpu", quick=True), ids=lambda case: case.operation + " " + case.title)
def test_what_a_gpu_is_asked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [peer for peer in peers_of(case) if peer.name != "torch.compile"]  # seconds of compiling
    monkeypatch.setattr(kernel_measure, "peers_of", lambda case: others)
    row = kernel_measure.described(case, CPU)
    on_gpu(case, CPU, 0.0, lambda key, value: kernel_measure._enter(row, key, value))
    assert [row["measured"][quantity]["seconds"] for quantity in (FORWARD, BOTH, BACKWARD)] == [1e-6, 2e-6, 3e-6]
    assert set(row["beside"]) >= {"launches", "peak memory", "gradients", "saved beside inputs", "host waits"}
    assert row["beside"]["saved beside inputs"] >= 0
    assert row["peers"]["reference"]["measured"][FORWARD]["seconds"] == 4e-6
    assert row["peers"]["reference"]["error"] <= 1e-4
    assert {name for name, found in row["peers"].items() if "why" in found} >= {
        peer.name for peer in others if peer.name in (FAST, FFT, FLASH_FFT, MRA_KERNELS)
    }


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_peer_that_computes_something_else_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    same = Ready(lambda t: (F.layer_norm(t["x"], (64,), t["weight"], t["bias"]),), restore=lambda y: y)
    other = Ready(lambda t: (1.1 * F.layer_norm(t["x"], (64,), t["weight"], t["bias"]),), restore=lambda y: y)

    def fails(case: Case) -> Ready:
        raise RuntimeError("broken")

    peers = [Peer("same", lambda c: same), Peer("other", lambda c: other), Peer("broken", fails)]
    monkeypatch.setattr(kernel_measure, "peers_of", lambda case: peers)
    row: dict[str, Any] = {}
    on_gpu(norm_case(), CPU, 0.0, lambda key, value: kernel_measure._enter(row, key, value))
    assert "measured" in row["peers"]["same"]
    assert row["peers"]["other"]["why"].startswith("computes something else (relative difference 1.0e-01")
    assert row["peers"]["broken"]["why"] == "broken"


def test_what_a_forward_pass_keeps() -> None:
    """The mean and the deviation of 16 rows in float32, and nothing of the inputs' size."""
    case = norm_case()
    assert kernel_measure.Passes(case.call, [case.make(1, CPU)]).saved() == 2 * 16 * 4


# Pages.


def cells(lines: list[str], *begins: str) -> list[list[str]]:
    found = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [line for line in found if tuple(line[: len(begins)]) == begins]


def test_the_page_of_a_gpu_from_made_up_timings() -> None:
    goals = (
        Goal(FORWARD, 2e-6), Goal(BACKWARD, 2e-6), Goal("launches", 1), Goal("saved beside inputs", 0),
        Goal("two runs differ", 0),
    )  # fmt: skip
    against = (Against(TORCH, FORWARD, 1.5), Against(TORCH, BACKWARD, 3.0), Against(FAST, FORWARD, 1))
    case = norm_case(goals=goals, against=against, forward=Work(4.3e6), backward=Work(0, 790e6))
    row = kernel_measure.described(case, CPU) | {
        "form": "compiled", "check": {"shape": case.shape, "errors": {"result 1": 1e-7}, "allowed": 2e-6, "right": True,
                                      "runs_equal": True},
        "measured": {
            FORWARD: {"seconds": 1.25e-6, "captured": True}, BACKWARD: {"seconds": 4e-6, "captured": True},
            BOTH: {"seconds": 5e-6, "captured": True},
        },
        "beside": {"launches": 2, "peak memory": 1, "gradients": 1, "saved beside inputs": 0, "host waits": False},
        "peers": {
            TORCH: {"measured": {FORWARD: {"seconds": 2.5e-6}, BACKWARD: {"seconds": 8e-6}}},
            FAST: {"why": "not installed"},
        },
    }  # fmt: skip
    lines = gpu_lines({"about": {"GPU": "made up"}, "ceilings": CEILINGS, "rows": [row]}, [case])
    name = "LayerNorm, [16, 64]"
    assert cells(lines, name, FORWARD)[0][2:] == ["≤ 2.0 µs", "1.2 µs", "1.60", "80%", "met"]
    assert cells(lines, name, BACKWARD)[0][2:] == ["≤ 2.0 µs", "4.0 µs", "0.50", "25%", "missed, 2.00 times the target"]
    assert cells(lines, name, "launches")[0][2:] == ["≤ 1", "2", "0.50", "–", "missed, 2.00 times the target"]
    assert cells(lines, name, "saved beside inputs")[0][2:] == ["none", "none", "–", "–", "met"]
    assert cells(lines, name, "two runs differ")[0][2:] == ["no", "no", "–", "–", "met"]
    assert cells(lines, name, FORWARD, TORCH)[0][3:] == ["2.5 µs", "2.00×", "1.50×", "met"]
    assert cells(lines, name, BACKWARD, TORCH)[0][3:] == ["8.0 µs", "2.00×", "3.00×", "missed"]
    assert cells(lines, name, "–", FAST)[0][3:] == ["–", "–", "1.00×", "not installed"]
    assert measured(row, BOTH) == 5e-6 and measured(None, BOTH) is None


def test_the_page_without_a_gpu_has_targets_and_no_numbers() -> None:
    lines = gpu_lines({"about": {}, "rows": []}, cases("cuda"))
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    assert all(row[3] == "not measured" for row in rows)
    goals = sum(len(case.goals) + len(case.against) or 1 for case in cases("cuda"))
    assert len(rows) == goals
    assert "≤ 17.5 µs" in {row[2] for row in rows} and "≥ 40×" in {row[2] for row in rows}
    assert "farspan bench kernels" in lines[-1]


def test_the_pages_in_the_repository_are_what_the_command_writes() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    gpu, cpu = (json.loads((folder / f"{name}.json").read_text()) for name in ("kernels", "kernels_cpu"))
    assert (folder / "kernels.md").read_text() == "\n".join(gpu_lines(gpu, cases("cuda"))) + "\n"
    assert (folder / "kernels_cpu.md").read_text() == "\n".join(cpu_lines(cpu)) + "\n"
    if cpu["rows"]:
        assert {(row["title"], row["shape"]) for row in cpu["rows"]} == {(c.title, c.shape) for c in cases("cpu")}
    assert all(row["check"]["right"] for row in cpu["rows"])


# The command.


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "new" / "bench"
    assert main(["bench", "kernels", "--quick", "--threads", "1", "--out", str(out)]) == 0
    results = json.loads((out / "kernels_cpu.json").read_text())
    assert set(results["about"]) >= {"CPU", "threads", "torch", "farspan", "date"}
    assert results["about"]["threads"] == "1"
    assert [row["title"] for row in results["rows"]] == [case.title for case in cases("cpu", quick=True)]
    for row in results["rows"]:
        assert row["check"]["right"] and "failed" not in row
        assert all(seconds > 0 for side in row["sides"].values() for q in (FORWARD, BOTH) for seconds in side[q])
    page = (out / "kernels_cpu.md").read_text()
    assert page in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["kernels_cpu.json", "kernels_cpu.md"]
    for wrong, said in (
        (["--quick", "--out", str(out)], "is there already"),
        (["--operations", "emma", "--out", str(tmp_path / "x")], "--operations emma: choose from ema, mra"),
        (["--device", "cuda", "--out", str(tmp_path / "x")], "torch sees no GPU"),
        (["--threads", "0", "--out", str(tmp_path / "x")], "--threads 0"),
    ):
        assert main(["bench", "kernels", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_cpu_writes_the_page_that_says_not_measured_and_leaves_a_measured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farspan.pretrain.bench import kernels as command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "_measured", lambda *arguments: {"rows": []})
    assert main(["bench", "kernels", "--out", str(tmp_path)]) == 0
    assert "not measured" in (tmp_path / "kernels.md").read_text()
    (tmp_path / "kernels.json").write_text('{"rows": [1]}')
    (tmp_path / "kernels.md").write_text("measured")
    assert main(["bench", "kernels", "--replace", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "kernels.md").read_text() == "measured"
