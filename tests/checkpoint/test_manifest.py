"""The manifest: what is written is what is read; damage and nonsense are refused, and nothing outside is opened."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from checkpoints import edit, logicals, opened, randoms, refused, sealed, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farspan.parallel.mesh import Axis
from farspan.parallel.parts import Part
from farspan.pretrain.checkpoint.manifest import DTYPES, Entry, Manifest, Shard, merge_entries
from farspan.pretrain.checkpoint.reader import Reader
from farspan.pretrain.checksums import checksum

WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
TABLES = st.dictionaries(WORDS, JSON, max_size=3)
FILES = [f"weights-{n:05d}.safetensors" for n in range(6)]
MANY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def entries(draw):
    """A tensor cut into slices of a dimension, and these into runs."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    dim = draw(st.integers(0, max(len(shape) - 1, 0)))
    shards = {}
    for kind in draw(st.sampled_from([["weight"], ["weight", "master"], ["weight", "exp_avg", "exp_avg_sq"]])):
        size = shape[dim] if shape else 1
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        slices = [Part.of_slice(shape, dim, *ends) for ends in itertools.pairwise(cuts)] if shape else []
        parts = [part.run(*half) for part in slices for middle in (part.values // 2,)
                 for half in ((0, middle), (middle, part.values))] or [Part.whole(shape)]  # fmt: skip
        shards[kind] = tuple(Shard(FILES[n], part) for n, part in enumerate(parts))
    dtypes = {kind: draw(st.sampled_from(sorted(DTYPES.values(), key=str))) for kind in shards}
    return Entry(shape, dtypes, shards, draw(st.none() | st.integers(0, 10**6).map(float)))


ABOUT = st.fixed_dictionaries({"bytes": st.integers(0, 2**40), "checksums": st.text("0123456789abcdef", max_size=32)})


@MANY
@given(
    step=st.integers(0, 10**9), heads=st.lists(WORDS, max_size=3),
    tensors=st.dictionaries(WORDS, entries(), max_size=3),
    about=ABOUT, tokenizer=st.dictionaries(st.text("äbc. -", min_size=4), ABOUT, max_size=2), table=TABLES,
)  # fmt: skip
def test_what_is_written_is_what_is_read(tmp_path, step, heads, tensors, about, tokenizer, table):
    others = ("model", "layout", "trainer", "metrics", "huggingface", "config", "written_by")
    written = Manifest(
        step=step, heads=tuple(heads), tensors=tensors, files=dict.fromkeys(FILES, about), tokenizer=tokenizer,
        **{name: {name: table} for name in others},
    )  # fmt: skip
    written.write(tmp_path)
    assert Manifest.read(tmp_path) == written
    value = json.loads((tmp_path / "manifest.json").read_text())
    assert (value["format"], value["version"], value["step"]) == ("farspan-checkpoint", 2, step)
    assert written.bytes == 6 * about["bytes"]


def test_a_line_for_every_tensor_and_file(once):
    """A person may look at it, and diff it."""
    lines = (once / "manifest.json").read_text().splitlines()
    for name in (*FILES[:2], "words", "bias"):
        assert sum(line.startswith(f'  "{name}": {{') for line in lines) == 1, name


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A checkpoint of a few tensors, each cut in two."""
    values = randoms(logicals(10, 1))
    del values["norm"]
    return write_checkpoint(
        tmp_path_factory.mktemp("once") / "made", {"weight": values, "exp_avg": {"bias": values["bias"]}},
        lambda name: [Part.of_rank(logicals(10, 2)[name], Axis(rank, 2, None)) for rank in range(2)],
    )  # fmt: skip


@pytest.fixture
def made(once):
    """A checkpoint whose manifest a test may change."""
    text = (once / "manifest.json").read_bytes()
    yield once
    (once / "manifest.json").write_bytes(text)


# Damage.


def test_every_byte_and_length_that_is_not_what_was_written(tmp_path):
    """Spaces and the ends of lines too: what is not covered today may mean something tomorrow."""
    Manifest(7, {"a": "ä"}, ("lm",), {"x": Entry((), {}, {})}, {"f": {"bytes": 1, "checksums": "0"}}).write(tmp_path)
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for at, byte in enumerate(content):
        for flip in {7, 0x80, byte ^ ord(" ")} - {0}:  # 7: the end of a line is another one
            path.write_bytes(content[:at] + bytes([byte ^ flip]) + content[at + 1 :])
            refused(lambda: Manifest.read(tmp_path), f"{path} is ")
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(lambda: Manifest.read(tmp_path), f"{path} is damaged")
    for changed in (content + b"\n", content + b" ", b" " + content, b"\xef\xbb\xbf" + content, content * 2,
                    content.replace(b"\n", b"\r\n"), content.replace(b"{\n", b'{"more": 1,\n', 1),
                    content.decode().encode("utf-16")):  # fmt: skip
        path.write_bytes(changed)
        refused(lambda: Manifest.read(tmp_path), f"{path} is damaged")
    path.write_bytes(content)
    assert Manifest.read(tmp_path).step == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged (not JSON: "), ("[]", "is damaged (it holds no JSON object)"), ("5", "no JSON object"),
        ("[" * 100_000, "is damaged"),
        ('{"a":' * 100_000, "is damaged"), ('{"step": ' + "9" * 5000 + "}", "is damaged"),
        ('"\\ud800"', "is damaged"),
        ("{}", "is None version None; this Farspan reads 'farspan-checkpoint' version 2: "),
        ('{"format": "other\\n", "version": 2}', "is 'other\\n' version 2; this Farspan reads"),
        ('{"format": "farspan-checkpoint", "version": 1}', "version 1; this Farspan reads 'farspan-check"),
        ('{"format": "farspan-checkpoint", "version": 2}', "is damaged"),
    ],
)  # fmt: skip
def test_something_else(text, message, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    refused(lambda: Manifest.read(tmp_path), message)


def test_no_manifest(tmp_path):
    refused(lambda: Manifest.read(tmp_path), f"{tmp_path / 'manifest.json'} is missing: ")
    refused(lambda: Manifest.read(tmp_path / "none"), "manifest.json is missing: ")
    (tmp_path / "file").write_text("")
    refused(lambda: Manifest.read(tmp_path / "file"), "manifest.json is missing: ")
    (tmp_path / "manifest.json").mkdir()
    refused(lambda: Manifest.read(tmp_path), "manifest.json is missing: ")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_opened(kind, tmp_path):
    path = tmp_path / "manifest.json"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with opened() as files:
        refused(lambda: Manifest.read(tmp_path), f"{path} is missing: ")
    assert not files


# Nonsense with a right checksum.


def test_a_manifest_with_a_right_checksum_is_read(made):
    """What the tests below change is refused for the change alone."""
    edit(made, lambda m: None)
    assert set(Manifest.read(made).tensors) == {"words", "bias", "qkv", "down"}
    assert Reader(made).tensor("bias").shape == (10,)


NAMES = [
    "", ".", "..", "../x", "../../etc/passwd", "/etc/passwd", "/", "a/b", "./a", "a/", "a/..", "\0", "a\0b", "a\nb",
    "\ud800", "..\\x", "C:\\x", "x" * 256, "ü" * 200, "~root/\x7f", "a\u2028b",
]  # fmt: skip


@pytest.mark.parametrize("table", ["files", "tokenizer"])
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_file_that_does_not_lie_in_the_folder(name, table, made):
    """Refused before anything is opened, and every file that is opened for any of it lies there."""

    def rename(m):
        m[table] = {name if key == FILES[1] else key: about for key, about in (m[table] or m["files"]).items()}

    edit(made, rename)
    with opened() as files:
        refused(lambda: Reader(made), f"{made / 'manifest.json'} is damaged: it names the file ")
    assert {*files} == {str(made / "manifest.json")}


NUMBERS = [-1, 2**63, 10**30, 1.0, 0.5, math.nan, math.inf, True, None, "1", [1], {}]
NONSENSE = {
    **{f"step {n!r}": lambda m, n=n: m.update(step=n) for n in (*NUMBERS[:1], *NUMBERS[3:])},
    **{f"heads {h!r}": lambda m, h=h: m.update(heads=h) for h in ("lm", None, {}, [1], [["lm"]], [None])},
    **{f"bytes {n!r}": lambda m, n=n: m["files"][FILES[0]].update(bytes=n) for n in NUMBERS},
    **{f"checksums {c!r}": lambda m, c=c: m["files"][FILES[0]].update(checksums=c) for c in (None, 5, ["0"], True)},
    **{f"a file that is {a!r}": lambda m, a=a: m["files"].update({FILES[0]: a}) for a in (None, 3, "x", [], {})},
    **{f"a tensor that is {e!r}": lambda m, e=e: m["tensors"].update(x=e) for e in (None, 3, "x", [], {})},
    **{f"without {name}": lambda m, name=name: m.pop(name) for name in (
        "step", "heads", "model", "files", "tokenizer", "tensors", "layout", "trainer", "metrics", "huggingface",
        "config", "written_by",
    )},
    **{f"{name} that is {v!r}": lambda m, name=name, v=v: m.update({name: v}) for name in (
        "model", "files", "tokenizer", "tensors", "layout", "trainer", "metrics", "huggingface", "config", "written_by",
    ) for v in ([], None, "x")},
    **{f"an entry without {key}": lambda m, key=key: m["tensors"]["words"].pop(key)
       for key in ("shape", "step", "dtypes", "shards")},
    **{f"a tensor updated {n!r} times": lambda m, n=n: m["tensors"]["words"].update(step=n)
       for n in (-1, math.nan, math.inf, -math.inf, True, "1", [], 10**400)},
    **{f"a shape {s!r}": lambda m, s=s: m["tensors"]["words"].update(shape=s)
       for s in (None, 3, "10", {}, [10], [10, 8.0], [10, True], [-10, -8], [5, 16], [2**62, 2**62])},
    **{f"a dtype {d!r}": lambda m, d=d: m["tensors"]["words"].update(dtypes={"weight": d})
       for d in (None, 3, "float31", "bool", "torch.float32", [], {}, "__class__")},
    "no dtype": lambda m: m["tensors"]["words"].update(dtypes={}),
    "a dtype too many": lambda m: m["tensors"]["words"]["dtypes"].update(exp_avg="float32"),
    **{f"shards {s!r}": lambda m, s=s: m["tensors"]["words"].update(shards=s) for s in (
        None, [], "x", {"weight": None}, {"weight": 3}, {"weight": [[]]}, {"weight": [None]}, {"weight": ["012345"]},
        {"weight": {"0": 1}}, {"weight": [[0, 0, 0, 8, 0]]}, {"weight": [[0, 0, 0, 8, 0, 64, 0]]},
    )},
    **{f"{key} {n!r} of a shard": lambda m, at=at, n=n: m["tensors"]["words"]["shards"]["weight"][0].__setitem__(at, n)
       for at, key in enumerate(("file", "dim", "start", "stop", "begin", "end")) for n in NUMBERS},
    "a file that is not there": lambda m: m["tensors"]["words"]["shards"]["weight"][0].__setitem__(0, 4),
    "a dimension that is not there": lambda m: m["tensors"]["words"]["shards"]["weight"][0].__setitem__(1, 2),
    "entries that are not there": lambda m: m["tensors"]["words"]["shards"]["weight"][1].__setitem__(3, 11),
    "values that are not there": lambda m: m["tensors"]["words"]["shards"]["weight"][0].__setitem__(5, 65),
    "a slice that runs back": lambda m: m["tensors"]["words"]["shards"]["weight"][0].__setitem__(2, 9),
    "a run that runs back": lambda m: m["tensors"]["words"]["shards"]["weight"][0].__setitem__(4, 65),
}  # fmt: skip
COVERED = {  # values twice, so that as many others may lack without the count telling
    "the same slice twice": [[0, 0, 0, 8, 0, 64], [1, 0, 0, 8, 0, 64]],
    "a slice in another": [[0, 0, 0, 8, 0, 64], [1, 0, 4, 8, 0, 32]],
    "slices that overlap": [[0, 0, 0, 6, 0, 48], [1, 0, 4, 8, 0, 32]],
    "runs that overlap": [[0, 0, 0, 10, 0, 50], [1, 0, 0, 10, 20, 50]],
    "runs in one another": [[0, 0, 0, 10, 0, 70], [1, 0, 0, 10, 60, 70]],
    "runs of slices that overlap": [[0, 0, 0, 8, 0, 10], [1, 0, 2, 10, 0, 64]],
    "two dimensions": [[0, 0, 0, 10, 0, 40], [1, 1, 0, 8, 40, 80]],
    "one file": [[0, 0, 0, 8, 0, 64], [0, 0, 8, 10, 0, 16]],
}
NONSENSE |= {what: lambda m, s=s: m["tensors"]["words"]["shards"].update(weight=s) for what, s in COVERED.items()}


@pytest.mark.parametrize("change", NONSENSE.values(), ids=NONSENSE)
def test_nonsense(change, made):
    edit(made, change)
    refused(lambda: Manifest.read(made), f"{made / 'manifest.json'} is damaged: ")


def test_parts_of_nothing_are_no_harm(made):
    """A rank may have nothing but padding, or a partition nothing of a tensor."""
    nothing = [[0, 0, 0, 8, 0, 64], [0, 0, 0, 8, 5, 5], [1, 0, 8, 10, 0, 16], [1, 0, 10, 10, 0, 0]]
    edit(made, lambda m: m["tensors"]["words"]["shards"].update(weight=nothing))
    assert len(Manifest.read(made).tensors["words"].shards["weight"]) == 4


def paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused_or_read(data, made):
    """One value of it is any other: an error in one line, and whatever it says no file outside is opened."""
    path = made / "manifest.json"
    original = path.read_text()
    value = json.loads(original)
    del value["checksum"]
    changed = copy.deepcopy(value)
    tables = [p for p in paths(value) if p and p[0] in ("files", "tensors", "step", "heads", "layout")]
    where = data.draw(st.sampled_from(tables))
    inner = changed
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = data.draw(JSON | st.sampled_from([0, 1, 2, 2**31, 2**62, 1e300, "../x"]))
    path.write_text(sealed(changed))
    try:
        with opened() as files:
            try:
                reader = Reader(made)
                for name in reader.names():
                    for kind in reader.kinds(name):
                        reader.tensor(name, kind=kind)
                reader.verify()
            except ValueError as error:
                assert "\n" not in str(error) and str(made) in str(error)
        assert all(Path(file).resolve().parent == made for file in files)
    finally:
        path.write_text(original)


# Of all ranks.


def test_entries_of_all_ranks_are_one_table():
    part = Part.whole((4,)).run(0, 2)
    first = Entry((4,), {"weight": torch.bfloat16}, {"weight": (Shard("a", part),)})
    second = Entry((4,), {"exp_avg": torch.float32}, {"exp_avg": (Shard("b", part),)}, 5.0)
    third = dataclasses.replace(first, shards={"weight": (Shard("c", Part.whole((4,)).run(2, 4)),)})
    merged = merge_entries([{"x": first, "y": first}, {"x": second}, {}, {"x": third, "z": third}])
    assert list(merged) == ["x", "y", "z"] and (merged["y"], merged["z"]) == (first, third)
    assert merged["x"] == Entry(
        (4,), {"weight": torch.bfloat16, "exp_avg": torch.float32},
        {"weight": (*first.shards["weight"], *third.shards["weight"]), "exp_avg": second.shards["exp_avg"]}, 5.0,
    )  # fmt: skip


def test_the_checksum_is_of_all_that_is_said(tmp_path):
    Manifest(3, {}, ()).write(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    said = json.loads(text)["checksum"]
    assert text.startswith("{\n") and text.endswith(f',\n"checksum": "{said}"\n}}\n')
    assert checksum(text[2 : -len(f',\n"checksum": "{said}"\n}}\n')].encode()) == said
