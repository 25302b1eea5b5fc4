"""Pydantic's findings in one line: what was given, what is allowed, what to set."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from pydantic import BaseModel, ValidationError


def one_line(error: ValidationError, section: str = "", known: Collection[str] = ()) -> str:
    """The first problem, in words, and how many more there are.

    ``section``: where the checked value stands in the whole.  ``known``: all keys (``section.key``) that there are.
    Checks of a whole section word their messages to begin with the name of one of its keys.
    """
    problems = error.errors()
    first = problems[0]
    key = ".".join(str(part) for part in (*([section] if section else []), *first["loc"]))
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        text = f"unknown key {key}{_nearest(key, known)}"
    elif first["type"] == "missing":
        text = f"{key} is missing: set it"
    elif first["type"] == "value_error":
        message = message.removeprefix("Value error, ")
        text = f"{key}.{message}" if key else message
    elif first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        text = f"{key} = {first['input']!r}: must be a section of keys, fill it or leave it out"
    else:
        given = "" if isinstance(first["input"], dict | BaseModel) else f" = {first['input']!r}"
        text = f"{key}{given}: {message.replace('Input should be', 'must be')}"
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _nearest(key: str, known: Collection[str]) -> str:
    """The known key that was probably meant: a like name in the same section, or the same name in another one."""
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    like = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if like:
        return f": did you mean {siblings[like[0]]}?"
    same = [k for k in known if k.rpartition(".")[2] == name]
    close = same or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f": did you mean {close[0]}?" if close else ""
