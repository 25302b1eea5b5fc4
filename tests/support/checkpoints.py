"""Checkpoints made piece by piece, without the processes that would save them, and manifests with right checksums."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.parallel.mesh import Axis, Mesh
from farspan.parallel.parts import Part, Piece
from farspan.parallel.sharding import Logical
from farspan.pretrain.checkpoint.folders import Retention
from farspan.pretrain.checkpoint.manifest import Entry, Manifest, Shard, merge_entries
from farspan.pretrain.checkpoint.reader import Reader, tensor_key
from farspan.pretrain.checkpoint.saver import Saved, Saver
from farspan.pretrain.checkpoint.tensor_file import write_tensors
from farspan.pretrain.checksums import checksum


def refused(action: Callable[[], Any], message: str = "", error: type[Exception] = ValueError) -> str:
    """It raises this error with one readable line that contains ``message``."""
    with pytest.raises(error) as caught:
        action()
    said = str(caught.value)
    assert type(caught.value) is error, repr(caught.value)
    assert message in said, said
    assert "\n" not in said and said.isprintable() and said, repr(said)
    return said


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Which files are opened: an audit hook cannot be removed, so there is one, which listens when it is asked to.

_listening: list[list[str]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _listening:
        _listening[-1].append(str(arguments[0]))


@contextmanager
def opened() -> Iterator[list[str]]:
    """The paths of all files that are opened inside."""
    if not hasattr(_hear, "there"):
        sys.addaudithook(_hear)
        _hear.there = True  # type: ignore[attr-defined]
    _listening.append([])
    try:
        yield _listening[-1]
    finally:
        _listening.pop()


# Layouts.


def logicals(vocabulary: int, size: int) -> dict[str, Logical]:
    """One of each kind of parameter, as it is on ``size`` tensor ranks."""
    padded = -(-vocabulary // (2 * size)) * 2 * size  # as vocabularies are, but to less than 128 a rank
    return {
        "words": Logical((vocabulary, 8), dim=0, padded=padded),
        "bias": Logical((vocabulary,), dim=0, padded=padded),
        "qkv": Logical((3, 8, 16), dim=1),
        "down": Logical((12, 8), dim=1),
        "norm": Logical((15,)),
    }


def taken(full: Tensor, part: Part) -> Tensor:
    """A part's values, from the whole tensor."""
    if full.dim():
        full = full.narrow(part.dim, part.start, part.stop - part.start)
    return full.reshape(-1)[part.begin : part.end].clone()


def held(logical: Logical, tensor: int, data: int) -> list[Part]:
    """What the ranks of so many tensor and ZeRO partitions hold, by rank; some of the last ones nothing."""
    parts = []
    for rank in range(tensor):
        part = Part.of_rank(logical, Axis(rank, tensor, None))
        if logical.dim is None and rank:
            continue
        each = -(-part.values // data)
        parts += [part.run(n * each, (n + 1) * each) for n in range(data)]
    return parts


@dataclasses.dataclass
class InMemory:
    """A checkpoint as an optimizer reads it, of whole tensors in memory."""

    tensors: dict[str, dict[str, Tensor]]  # name → kind → values
    steps: dict[str, float]

    def kinds(self, name: str) -> Collection[str]:
        return self.tensors[name].keys()

    def step(self, name: str) -> float | None:
        return self.steps.get(name)

    def read(self, kind: str, name: str, part: Part, into: Tensor) -> None:
        values = taken(self.tensors[name][kind], part)
        assert into.shape == values.shape and part.values
        into.copy_(values)


def write_checkpoint(
    folder: Path, values: Mapping[str, Mapping[str, Tensor]], parts: Callable[[str], list[Part]], **about: Any
) -> Path:
    """``values``: kind → name → the whole tensor; ``parts``: which of them each rank writes, in files of its own."""
    folder.mkdir(parents=True)
    files: dict[str, dict[str, Tensor]] = {}
    entries: list[dict[str, Entry]] = []
    for kind, tensors in values.items():
        for name, full in tensors.items():
            for rank, part in enumerate(parts(name)):
                file = f"{'weights' if kind == 'weight' else 'optimizer'}-{rank:05d}.safetensors"
                files.setdefault(file, {})[tensor_key(kind, name)] = taken(full, part)
                shards = {kind: (Shard(file, part),)}
                entries.append({name: Entry(tuple(full.shape), {kind: full.dtype}, shards, 3.0)})
    written = {file: write_tensors(folder / file, tensors) for file, tensors in files.items()}
    Manifest(7, {}, ("lm",), merge_entries(entries), written, **about).write(folder)
    return folder


# Manifests that somebody else has written.


def sealed(value: Mapping[str, Any]) -> str:
    """The text of a manifest that says this, with the right checksum."""
    body = json.dumps(value)[1:-1]
    return f'{{\n{body},\n"checksum": "{checksum(body.encode())}"\n}}\n'


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a manifest says, and its checksum with it."""
    path = folder / "manifest.json"
    value = json.loads(path.read_text())
    del value["checksum"]
    change(value)
    path.write_text(sealed(value))


def randoms(logical: Mapping[str, Logical], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(x.shape, generator=generator).to(dtype) for name, x in logical.items()}


# Saves of one process.

ALL = Retention()
SHAPES = {"a.weight": (5, 3), "b.bias": (7,)}


def state_at(step: int) -> dict[str, Tensor]:
    return {name: torch.full(shape, float(step)) + torch.arange(shape[-1]) for name, shape in SHAPES.items()}


def pieces_at(step: int) -> list[Piece]:
    """Weights and a moment, which say the step."""
    whole = {name: (Part.whole(tuple(x.shape)), x.view(-1)) for name, x in state_at(step).items()}
    weights = [Piece("weight", name, part, values, True) for name, (part, values) in whole.items()]
    return weights + [Piece("exp_avg", name, part, -values, True) for name, (part, values) in whole.items()]


def manifest_at(step: int, loss: float | None = None) -> Manifest:
    return Manifest(step, {"size": 3}, ("lm",), metrics={} if loss is None else {"validation_loss": loss})


def save(
    root: Path,
    step: int,
    retention: Retention = ALL,
    *,
    asynchronous: bool = False,
    tokenizer: Path | None = None,
    loss: float | None = None,
) -> Saved:
    """As a process of its own that has come to this step."""
    saver = Saver(root, Mesh.solo(), retention, asynchronous=asynchronous)
    ended = saver.save(manifest_at(step, loss), pieces_at(step), dict.fromkeys(SHAPES, float(step)), tokenizer)
    if asynchronous:
        assert ended == []
        ended = [saver.finish()]
    assert len(ended) == 1 and saver.finish() is None
    return ended[0]


def check_whole(folder: Path) -> int:
    """All of it is there, and of one step."""
    reader = Reader(folder)
    reader.verify()
    step = reader.manifest.step
    assert folder.name == f"step-{step:08d}"
    for name, value in state_at(step).items():
        assert torch.equal(reader.tensor(name), value) and torch.equal(reader.tensor(name, kind="exp_avg"), -value)
        assert reader.step(name) == step
    return step
