"""One operation at one size: is it right, what does it cost, and what do its peers cost?"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from ...kernels import forms
from . import timing
from .kernel_cases import BACKWARD, BOTH, FORWARD, Case, Function, Problem, Tensors
from .kernel_list import cases
from .kernel_peers import Missing, Peer, Ready, peers_of

Row = dict[str, Any]
Report = Callable[[str, Any], None]
REFERENCE, COMPILED = "reference", "compiled"
# What is measured beside seconds.
LAUNCHES, PEAK, SAVED, WAITS = "launches", "peak memory", "saved beside inputs", "host waits"
DIFFERS = "two runs differ"


def described(case: Case, device: torch.device) -> Row:
    """What is known of a row before anything has run."""
    return {
        "operation": case.operation, "title": case.title, "shape": case.shape, "dtype": str(case.dtype).split(".")[1],
        "device": device.type,
    }  # fmt: skip


# Right or wrong.


def evaluate(call: Function, problem: Problem) -> tuple[list[Tensor], Tensors]:
    """Results, and the gradients of what learns."""
    leaves = problem.leaves()
    outputs = call(leaves)
    learnt = [leaves[name] for name in problem.learnt]
    gradients = torch.autograd.grad(outputs, learnt, _upstream(outputs, problem))
    return [y.detach() for y in outputs], dict(zip(problem.learnt, gradients, strict=True))


def _upstream(outputs: tuple[Tensor, ...], problem: Problem) -> list[Tensor]:
    """The gradients of the outputs; ones for a peer that has others."""
    given = problem.upstream
    if [y.shape for y in outputs] != [g.shape for g in given]:
        return [torch.ones_like(y) for y in outputs]
    return [g.to(y.dtype) for y, g in zip(outputs, given, strict=True)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def check(case: Case, device: torch.device, seed: int) -> Row:
    """The public function on fresh inputs against the reference in float64, and against a second run of its own."""
    problem = case.make(seed, device)
    try:
        exact, exact_gradients = evaluate(case.call, problem.to(torch.float64))
    except torch.OutOfMemoryError:
        if case.smaller is None:
            raise
        return check(case.smaller, device, seed)
    (outputs, gradients), (again, gradients_again) = evaluate(case.call, problem), evaluate(case.call, problem)
    errors = {f"result {i + 1}": relative_error(y, e) for i, (y, e) in enumerate(zip(outputs, exact, strict=True))}
    errors |= {f"gradient of {name}": relative_error(g, exact_gradients[name]) for name, g in gradients.items()}
    same = all(map(torch.equal, outputs, again)) and all(
        torch.equal(gradients[name], gradients_again[name]) for name in gradients
    )
    right = all(error <= case.error for error in errors.values())  # nan is not
    return {"shape": case.shape, "errors": errors, "allowed": case.error, "right": right, "runs_equal": same}


# On a GPU.


def on_gpu(case: Case, device: torch.device, seconds: float, report: Report) -> None:
    """Report ``form``, ``check``, ``measured``, ``beside`` and ``peers`` as they are found."""
    report("form", str(forms.choice(case.operation, device)))
    checked = check(case, device, seed=1)
    report("check", checked)
    if not checked["right"]:
        return
    with timing.own_stream():
        first = case.make(2, device)
        sets = [first, *(case.make(2 + i, device) for i in range(1, timing.sets_for(first.bytes, device)))]
        passes = Passes(case.call, sets)
        report("measured", passes.timings(seconds))
        report("beside", passes.beside())
        del passes
        for peer in peers_of(case):
            report("peers", {peer.name: _beside(peer, case, sets, seconds)})


class Passes:
    """A function on several sets of inputs, its passes to be called by their number.

    ``prepare`` makes its inputs of a problem's.
    """

    def __init__(
        self, function: Function, problems: list[Problem], prepare: Callable[[Tensors], Tensors] | None = None
    ) -> None:
        self.function, self.problems = function, problems
        self.inputs: list[Tensors] = []
        for problem in problems:
            if prepare is None:
                self.inputs.append(problem.leaves())
                continue
            with torch.no_grad():
                made = prepare(problem.inputs)
            learnt = [name for name in made if name in problem.learnt or name not in problem.inputs]
            self.inputs.append(Problem(made, tuple(n for n in learnt if made[n].is_floating_point()), ()).leaves())
        self.leaves = [[x for x in inputs.values() if x.requires_grad] for inputs in self.inputs]
        with torch.no_grad():
            outputs = function(self.inputs[0])
        self.upstream = [_upstream(outputs, problem) for problem in problems]
        del outputs

    def forward(self, i: int) -> tuple[Tensor, ...]:
        return self.function(self.inputs[i])

    def both(self, i: int) -> tuple[Tensor, ...]:
        return self._gradients(i, self.forward(i))

    def _gradients(self, i: int, outputs: tuple[Tensor, ...], *, again: bool = False) -> tuple[Tensor, ...]:
        # A peer may not depend on everything that learns.
        return torch.autograd.grad(outputs, self.leaves[i], self.upstream[i], retain_graph=again, allow_unused=True)

    def timings(self, seconds: float) -> Row:
        """Of the forward pass (which keeps what the backward pass needs), the backward pass, and both in turn."""
        n = len(self.inputs)

        def seconds_of(call: timing.Call) -> Row:
            return dataclasses.asdict(timing.device_time(call, n, seconds=seconds))

        found = {FORWARD: seconds_of(self.forward), BOTH: seconds_of(self.both)}
        outputs = [self.forward(i) for i in range(n)]
        found[BACKWARD] = seconds_of(lambda i: self._gradients(i, outputs[i], again=True))
        return found

    def beside(self) -> Row:
        with torch.no_grad():
            started = timing.launches(self.forward)
        return {
            LAUNCHES: started,
            "launches, forward and backward": timing.launches(self.both),
            PEAK: timing.added_memory(self.both),
            "gradients": sum(x.nbytes for x in self.leaves[0]),
            SAVED: self.saved(),
            WAITS: timing.synchronises(self.both),
        }

    def saved(self) -> int:
        """Bytes that a forward pass keeps for the backward pass, inputs and results not counted."""
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = self.forward(0)
        for x in (*self.inputs[0].values(), *outputs):
            kept.pop(x.untyped_storage().data_ptr(), None)
        return sum(kept.values())


def _beside(peer: Peer, case: Case, problems: list[Problem], seconds: float) -> Row:
    """What a peer takes for the same; ``why`` it could not be measured."""
    try:
        ready = peer.find(case)
        error = _peer_error(ready, case, problems[0])
        if error is not None and not error <= max(5 * case.error, 0.02):
            return {"why": f"computes something else (relative difference {error:.1e})"}
        passes = Passes(ready.call, problems, ready.prepare)
        return {"measured": passes.timings(seconds), PEAK: timing.added_memory(passes.both), "error": error}
    except Missing as missing:
        return {"why": str(missing)}
    except torch.OutOfMemoryError:
        return {"why": "does not fit in memory"}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"why": _in_short(error)}


def _peer_error(ready: Ready, case: Case, problem: Problem) -> float | None:
    """How far its results are from the case's; None where it has others."""
    if ready.restore is None:
        return None
    with torch.no_grad():
        theirs, ours = ready.restore(ready.call(ready.prepare(problem.inputs))), case.call(problem.inputs)
    return max(relative_error(a, b) for a, b in zip(theirs, ours, strict=True))


# On a CPU.


def on_cpu(case: Case, seconds: float, report: Report) -> None:
    """Report ``form``, ``check`` and ``sides``: rounds of the reference, the compiled form and torch's operation."""
    device = torch.device("cpu")
    compiled = forms.compiled(case.operation, device)
    report("form", str(forms.choice(case.operation, device)))
    checked = check(case, device, seed=1)
    report("check", checked)
    if not checked["right"]:
        return
    reference = peers_of(case)[0].find(case).call
    sides: dict[str, Function] = {REFERENCE: reference}
    if compiled:
        sides[COMPILED] = case.call
    if case.own is not None:
        sides[case.own_name] = case.own
    problems = [case.make(2 + i, device) for i in range(timing.sets_for(0, device))]
    passes = {name: Passes(function, problems) for name, function in sides.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for quantity, share in ((FORWARD, 1 / 3), (BOTH, 2 / 3)):
        calls = {name: p.forward if quantity == FORWARD else p.both for name, p in passes.items()}
        with torch.set_grad_enabled(quantity == BOTH):
            found[quantity] = timing.in_turn(calls, len(problems), seconds=seconds * share)
    report("sides", {name: {quantity: found[quantity][name] for quantity in found} for name in sides})


def cpu_ratio(row: Row, quantity: str, faster: str, slower: str) -> float | None:
    """How many times as fast a side is as another: the median over rounds; None where one was not measured."""
    sides = row.get("sides", {})
    if faster not in sides or slower not in sides:
        return None
    return timing.ratio(sides[slower][quantity], sides[faster][quantity])


def cpu_seconds(row: Row, side: str, quantity: str) -> float | None:
    rounds = row.get("sides", {}).get(side)
    return None if rounds is None else statistics.median(rounds[quantity])


# In a process of its own.


def measure(case: Case, device: torch.device, seconds: float) -> Row:
    """In this process; what goes wrong is the row's ``failed``."""
    row = described(case, device)
    _run(case, device, seconds, lambda key, value: _enter(row, key, value))
    return row


def measure_apart(name: str, device: torch.device, seconds: float, quick: bool, limit: float) -> Row:
    """The case of this name in a process of its own: an access to memory that is not there, or a kernel that never
    ends, costs this row what was not measured until then, and no other.  ``limit``: seconds until it is ended."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(name, str(device), seconds, quick, sender))
    process.start()
    sender.close()
    (case,) = (c for c in cases(device.type, quick=quick) if c.name == name)
    return collect(receiver, process, described(case, device), limit)


def collect(receiver: Connection, process: BaseProcess, row: Row, limit: float) -> Row:
    """Fill the row with what the process sends until it sends the end; then, or where it does not, the process ends."""
    try:
        while True:
            if not receiver.poll(limit):
                row["failed"] = f"nothing came for {limit:.0f} s, so it was ended"
                return row
            key, value = receiver.recv()
            if key == "end":
                return row
            _enter(row, key, value)
    except EOFError:
        process.join(10)
        row["failed"] = f"its process ended with {process.exitcode}, see what it said"
        return row
    finally:
        process.kill()
        process.join()


def _enter(row: Row, key: str, value: Any) -> None:
    if key == "peers":
        row.setdefault(key, {}).update(value)
    else:
        row[key] = value


def _worker(name: str, device_name: str, seconds: float, quick: bool, sender: Connection) -> None:
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    (case,) = (c for c in cases(device.type, quick=quick) if c.name == name)
    _run(case, device, seconds, lambda key, value: sender.send((key, value)))
    sender.send(("end", None))


def _run(case: Case, device: torch.device, seconds: float, report: Report) -> None:
    try:
        if device.type == "cuda":
            on_gpu(case, device, seconds, report)
        else:
            on_cpu(case, seconds, report)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        with contextlib.suppress(OSError):
            report("failed", _in_short(error))


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:159]}…"


def ceilings_apart(device: torch.device, seconds: float) -> dict[str, float]:
    """``timing.ceilings`` in a process of its own, whose memory is free again afterwards."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(timing.ceilings, (device,), {"seconds": seconds})
