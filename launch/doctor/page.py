"""The page, and the same as JSON."""

from __future__ import annotations

import json
from typing import Any

from ...version import __version__
from .report import Finding, Section, exit_code

FORMAT = 1


def render(heading: str, sections: list[Section], findings: list[Finding]) -> str:
    lines = [heading]
    for section in sections:
        lines += [section.title, *(f"  {line}" for line in section.lines or ["nothing to say"])]
    if not findings:
        return "\n".join([*lines, "nothing to mend"]) + "\n"
    lines.append("to mend")
    for finding in findings:
        where = f"{some_hosts(finding.hosts)}: " if finding.hosts else ""
        lines += [
            f"  {finding.severity}: {where}{finding.what}",
            f"    why: {finding.why}",
            f"    do:  {finding.mend}",
        ]
    faults = sum(finding.severity == "fault" for finding in findings)
    lines.append(f"{faults} faults, {len(findings) - faults} warnings" + ("" if faults else ": a run can start"))
    return "\n".join(lines) + "\n"


def some_hosts(hosts: tuple[str, ...], most: int = 8) -> str:
    more = len(hosts) - most
    return ", ".join(hosts[:most]) + (f" and {more} more" if more > 0 else "")


def to_json(host: str, nodes: dict[str, list[Section]], sections: list[Section], findings: list[Finding]) -> str:
    """``nodes``: the sections of each node; ``sections``: those of all of them together."""
    value: dict[str, Any] = {
        "format": FORMAT,
        "farspan": __version__,
        "host": host,
        "exit_code": exit_code(findings),
        "to_mend": [finding.__dict__ | {"hosts": list(finding.hosts)} for finding in findings],
        "nodes": {name: {one.title: _body(one) for one in found} for name, found in nodes.items()},
        "cluster": {one.title: _body(one) for one in sections},
    }
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _body(section: Section) -> dict[str, Any]:
    return {"lines": section.lines, "facts": section.facts}
