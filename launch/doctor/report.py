"""What the doctor finds: sections with lines for people and facts for programs, and what is to be mended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

Severity = Literal["fault", "warning"]  # fault: a run would fail, or not be the run that was meant


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to mend: what is wrong, why it matters, what to do.  ``hosts``: where; empty: on the only node."""

    severity: Severity
    what: str
    why: str
    mend: str
    hosts: tuple[str, ...] = ()


@dataclasses.dataclass
class Section:
    """One part of the page.  ``facts`` hold what JSON can: the same as the lines, as numbers and with their units in
    their names."""

    title: str
    lines: list[str] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    findings: list[Finding] = dataclasses.field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def fault(self, what: str, why: str, mend: str) -> None:
        self.findings.append(Finding("fault", what, why, mend))

    def warn(self, what: str, why: str, mend: str) -> None:
        self.findings.append(Finding("warning", what, why, mend))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Section:
        findings = [Finding(**{**one, "hosts": tuple(one["hosts"])}) for one in value["findings"]]
        return Section(value["title"], value["lines"], value["facts"], findings)


def examine(title: str, look: Callable[[Section], None]) -> Section:
    """The section that ``look`` fills.  Whatever goes wrong while looking is itself a finding: the other sections are
    wanted all the more then."""
    section, began = Section(title), time.monotonic()
    try:
        look(section)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        section.warn(
            f"{title}: the doctor could not look at everything ({type(error).__name__}: {said})",
            "what it did not see may fail in a run",
            "look at it by hand; FARSPAN_TRACEBACK=1 shows where a run fails",
        )
    section.facts["seconds"] = round(time.monotonic() - began, 3)
    return section


def merge(findings: list[tuple[str, Finding]], hosts: int) -> list[Finding]:
    """Findings of several hosts: the same one is said once, with the hosts that have it; faults come first."""
    places: dict[Finding, list[str]] = {}
    for host, finding in findings:
        named = places.setdefault(dataclasses.replace(finding, hosts=()), list(finding.hosts))
        if hosts > 1 and host and host not in named:
            named.append(host)
    merged = [dataclasses.replace(finding, hosts=tuple(named)) for finding, named in places.items()]
    return sorted(merged, key=lambda finding: finding.severity != "fault")


def exit_code(findings: list[Finding]) -> int:
    return int(any(finding.severity == "fault" for finding in findings))
