"""What guards write when a run hangs: a report of each rank, and a summary that names who holds up the others.

Only the standard library: guards are small.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..pretrain.heartbeat import ranks_of
from .environment import NAMED, describe_ranks

# proc_pid_stat(5)
STATES = {
    "R": "running",
    "S": "asleep",
    "D": "waiting for a disk or a network file system",
    "T": "stopped (by a signal: SIGSTOP, or one like it)",
    "t": "stopped by a debugger",
    "Z": "ended",
}
STOPPED = ("T", "t")
_DATA = "data: "
_PACKAGE = str(Path(__file__).resolve().parents[1])

Report = Mapping[str, Any]


def to_text(report: Report) -> str:
    """For people, and in its last line everything as JSON (``from_text``)."""
    process, record = report["process"], report["record"]
    lines = [
        f"{who(report)}: no sign of life for {report['silent_seconds']:.1f} s, limit {report['limit_seconds']:g} s",
        f"at {report['time']}, {record['phase']}, {record['step']} steps done",
        f"process: {STATES.get(process['state'], process['state'])}",
        f"last collective: {describe_last(record)}",
        "",
        "groups (collectives begun, ended):",
        *(
            f"  {group['name']} {key}, {describe_ranks(ranks_of(group['ranks']))}: {group['begun']}, {group['ended']}"
            for key, group in record["groups"].items()
        ),
        "",
        "threads of the process (how many, name, state, the function of the kernel that it waits in):",
        *(f"  {thread}" for thread in process["threads"]),
        "",
        "Python stacks (most recent call first):",
        report["stacks"] or f"  none: {report['no_stacks']}",
        "",
        _DATA + json.dumps({key: value for key, value in report.items() if key != "stacks"}),
    ]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> Report:
    """What ``to_text`` was given, but for the stacks.  ValueError where there is none."""
    _, found, data = text.rpartition("\n" + _DATA)
    if not found:
        raise ValueError("no report of a guard")
    report: dict[str, Any] = json.loads(data)
    return report


def who(report: Report) -> str:
    return f"rank {report['rank']} of {report['world']} ({report['host']}, pid {report['pid']})"


def describe_last(record: Mapping[str, Any]) -> str:
    last = record["last"]
    if last is None:
        return "none yet"
    group = record["groups"][last["group"]]
    ended = last["number"] <= group["ended"]
    how = "waits in it" if last["waiting"] else "ended" if ended else "begun, not waited for yet"
    elements = f" of {last['elements']:,} elements" if last["elements"] else ""
    return (
        f"{last['name']}{elements}, number {last['number']} in the group {group['name']} {last['group']} of "
        f"{describe_ranks(ranks_of(group['ranks']))}: {how}, since {last['seconds']:.1f} s"
    )


def main_thread(stacks: str) -> str:
    """Its frames, of what faulthandler wrote: it says that thread last."""
    threads = re.findall(r"^(?:Current thread|Thread) .*\n((?:  File .*\n?)*)", stacks, flags=re.M)
    return str(threads[-1]) if threads else ""


def top_of(stacks: str) -> str | None:
    """Where the main thread stands, and where in this package."""
    frames = [line.strip() for line in main_thread(stacks).splitlines()]
    ours = [frame for frame in frames if f'"{_PACKAGE}/' in frame]
    return ", called from ".join(dict.fromkeys([*frames[:1], *ours[:1]])) or None


def waits_for(report: Report, reports: Mapping[int, Report]) -> list[int] | None:
    """The ranks that have not come to the collective in which this one waits; None: it waits in none.  A rank without a
    report has not, as far as is known."""
    record = report["record"]
    last = record["last"]
    if last is None or not last["waiting"]:
        return None

    def begun(rank: int) -> int:
        groups = reports[rank]["record"]["groups"] if rank in reports else {}
        return int(groups[last["group"]]["begun"]) if last["group"] in groups else 0

    ranks = ranks_of(record["groups"][last["group"]]["ranks"])
    return [rank for rank in ranks if rank != report["rank"] and begun(rank) < last["number"]]


def culprits(reports: Mapping[int, Report], world: int) -> dict[int, str]:
    """{rank: why it holds up the others}: the first of these that there is.

    Ranks whose process is stopped; ranks without a report; ranks that hang in a disk; ranks outside of any collective
    that have begun fewer than others, or else all outside; ranks that others wait for while they wait elsewhere
    themselves, those first that have come least far.
    """
    states = {rank: report["process"]["state"] for rank, report in reports.items()}
    if found := {rank: STATES[state] for rank, state in states.items() if state in STOPPED}:
        return found
    if missing := [rank for rank in range(world) if rank not in reports]:
        return dict.fromkeys(missing, "no report of it: its process, its guard or its node is gone")
    if found := {rank: STATES[state] for rank, state in states.items() if state == "D"}:
        return found
    waiting = {rank: waits_for(report, reports) for rank, report in reports.items()}
    outside = [rank for rank, ranks in waiting.items() if ranks is None]
    if outside:
        most: dict[str, int] = {}  # collectives of a group that a rank has begun
        for report in reports.values():
            for key, group in report["record"]["groups"].items():
                most[key] = max(most.get(key, 0), group["begun"])
        late = [rank for rank in outside if _is_behind(reports[rank], most)]
        return {rank: _where(reports[rank]) for rank in late or outside}
    wanted = {rank for ranks in waiting.values() for rank in ranks or ()}
    if not wanted:  # all have come, and still wait: nobody is late, something between them is broken
        return dict.fromkeys(waiting, "all its partners have come to the collective it waits in: look at the network")
    steps = {rank: reports[rank]["record"]["step"] for rank in wanted}
    return {
        rank: f"is waited for while it waits itself ({describe_last(reports[rank]['record'])})"
        for rank in sorted(wanted)
        if steps[rank] == min(steps.values())
    }


def said_of(rank: int, text: str) -> str | None:
    """Why a rank holds up the others, as the first lines of a ``summary`` say it; None where they do not name it."""
    found = re.search(rf"^the run hangs at rank {rank} of \d+(?: \([^)]*\))?: (.*)$", text.partition("\n\n")[0], re.M)
    return None if found is None else found[1]


def _is_behind(report: Report, most: Mapping[str, int]) -> bool:
    """Whether another rank has begun more collectives of a group that both are in."""
    return any(group["begun"] < most[key] for key, group in report["record"]["groups"].items())


def _where(report: Report) -> str:
    where = "outside of any collective"
    return f"{where}, {report['top']}" if report["top"] else where


def summary(reports: Mapping[int, Report], world: int) -> str:
    """Who holds up whom, in lines: the first names the culprits."""
    lines = []
    found = culprits(reports, world)
    for rank, why in list(found.items())[:NAMED]:
        name = who(reports[rank]) if rank in reports else f"rank {rank} of {world}"
        lines.append(f"the run hangs at {name}: {why}")
    if len(found) > NAMED:
        lines.append(f"and at {len(found) - NAMED} more of {describe_ranks(list(found))}")
    lines.append("")
    for _, report in sorted(reports.items()):
        waited = waits_for(report, reports)
        line = f"{who(report)}: {report['record']['phase']}, {report['record']['step']} steps done, "
        line += f"{STATES.get(report['process']['state'], report['process']['state'])}; "
        line += f"silent for {report['silent_seconds']:.1f} s; last collective: {describe_last(report['record'])}"
        if waited:
            line += f"; waits for {describe_ranks(waited)}"
        lines.append(line)
    if missing := [rank for rank in range(world) if rank not in reports]:
        lines.append(f"no report of {describe_ranks(missing)}")
    return "\n".join(lines) + "\n"
