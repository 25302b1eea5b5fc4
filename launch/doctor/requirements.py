"""Versions against what the packages themselves ask for: pip check's question, for what Farspan stands on."""

from __future__ import annotations

import dataclasses
import platform
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ...pretrain.provenance import ROOT


@dataclasses.dataclass(frozen=True)
class Broken:
    """A requirement that does not hold."""

    by: str  # "farspan", "datasets 5.2.0"
    requirement: str  # "torch>=2.11"
    found: str | None  # the installed version; None: not installed
    direct: bool  # Farspan's own requirement


@dataclasses.dataclass(frozen=True)
class Twice:
    """A package that lies in several folders of the import path."""

    name: str
    places: tuple[tuple[str, str], ...]  # (version, folder), in the order in which they are found


def own_requirements() -> tuple[str, list[str], dict[str, list[str]]]:
    """Which Python Farspan asks for, which packages, and which for each extra: from the pyproject.toml beside the
    sources, else from what was installed."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"], project["optional-dependencies"]
    found = metadata.metadata("farspan")
    plain, extras = [], {}  # type: ignore[var-annotated]
    for text in found.get_all("Requires-Dist") or []:
        extra = re.search(r"""extra\s*==\s*['"]([\w.-]+)['"]""", text)
        (extras.setdefault(extra[1], []) if extra else plain).append(text.split(";")[0].strip())
    return str(found["Requires-Python"] or ""), plain, extras


def version_of(name: str) -> str | None:
    """The installed version; None: not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def broken() -> list[Broken]:
    """What Farspan's requirements, and theirs in turn, ask for and do not find.  Of the optional ones those that are
    installed are held to their ranges."""
    python, plain, extras = own_requirements()
    found = []
    if python and platform.python_version() not in SpecifierSet(python, prereleases=True):
        found.append(Broken("farspan", f"Python {python}", platform.python_version(), True))
    wanted = [Requirement(text) for text in plain]
    for text in extras.get("hf", []):
        requirement = Requirement(text)
        if version_of(requirement.name) is not None:
            wanted.append(requirement)
    seen: set[str] = set()
    queue: list[tuple[str, Requirement, bool]] = [("farspan", requirement, True) for requirement in wanted]
    while queue:
        by, requirement, direct = queue.pop(0)
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(Broken(by, f"{requirement.name}{requirement.specifier}", version, direct))
        key = canonicalize_name(requirement.name)
        if version is not None and key not in seen:
            seen.add(key)
            queue += [(f"{requirement.name} {version}", one, False) for one in _requires(requirement)]
    return found


def _requires(requirement: Requirement) -> Iterator[Requirement]:
    """What a package asks for in this environment, with the extras that it was asked for with."""
    for text in metadata.requires(requirement.name) or []:
        try:
            one = Requirement(text)
        except InvalidRequirement:
            continue  # of packages from before the standard
        extras = ["", *requirement.extras]
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
            yield one


def installed_twice(names: list[str]) -> list[Twice]:
    """Of these packages, those that lie in several folders with different versions: the first is imported."""
    wanted, places = {canonicalize_name(name) for name in names}, {}  # type: ignore[var-annotated]
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"] or "")
        if name in wanted:
            place = distribution.version, str(distribution.locate_file(""))
            if place not in places.setdefault(name, []):
                places[name].append(place)
    return [
        Twice(name, tuple(found))
        for name, found in sorted(places.items())
        if len({version for version, _ in found}) > 1
    ]
