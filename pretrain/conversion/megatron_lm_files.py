"""The files of a Megatron-LM checkpoint: found in a folder or a zip, read without running anything that is in them.

Megatron-LM pickles its command-line arguments, random state and optimizer beside the weights.  Files are read by
torch's ``weights_only`` unpickler, with one inert stand-in for every class that it does not know.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pickle
import pickletools
import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

TRACKER = "latest_checkpointed_iteration.txt"
_PART = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(_\d+)?")  # tensor rank, pipeline rank, rank of experts
_MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")  # the second where the optimizer has a file of its own
_CHUNK = re.compile(r"model\d*")
# Of the standard library, what training checkpoints are known to name; of elsewhere any class may be.
_MODULES = (
    "_codecs", "_io", "argparse", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "functools",
    "io", "pathlib", "random", "signal", "types", "uuid",
)  # fmt: skip
_BUILTINS = (
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list", "object", "range",
    "set", "slice", "str", "tuple", "type",
)  # fmt: skip
_PLAIN = (bool, int, float, str, list, tuple)
_PICKLES_OF_OLD_FILE = 5  # a magic number, the protocol, the system, the content, the storages' keys
_TOUCHED = 256 << 20  # bytes read from mapped files until they are mapped anew, so that they do not count as memory


class _StandIn:
    """What becomes of every object whose class torch does not know: it runs nothing, and keeps its fields."""

    def __new__(cls, *arguments: Any) -> _StandIn:
        made = super().__new__(cls)
        made.fields = {}
        return made

    fields: Mapping[str, Any]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = state


def _empty_dict(*arguments: Any) -> dict[Any, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Content:
    """What one file holds of a model.

    ``chunks``: by Megatron's name of the part (``model``, or with an interleaved pipeline ``model0``, ``model1``, …)
    its tensors, nested names joined by dots.
    """

    args: Mapping[str, Any]
    version: float
    iteration: int | None
    chunks: Mapping[str, Mapping[str, Tensor]]


class PartFile:
    """The file of one tensor rank and pipeline stage: of this path, or, within another file, these bytes."""

    def __init__(self, where: str, source: Path | Callable[[], bytes]) -> None:
        self.where, self._source = where, source
        self._content: Content | None = None
        self._named: set[str] | None = None
        # Files older than torch 1.6 are no zip.
        self._mapped = isinstance(source, Path) and zipfile.is_zipfile(source)

    def content(self) -> Content:
        if self._content is None:
            self._content = self._read()
        return self._content

    def forget(self) -> None:
        """Let the pages of a mapped file go; one that had to be read whole stays."""
        if self._mapped:
            self._content = None

    def _read(self) -> Content:
        source = self._source if isinstance(self._source, Path) else io.BytesIO(self._source())
        try:
            if self._named is None:
                self._named = _named(source)
            foreign = next((name for name in sorted(self._named) if not _is_expected(name)), None)
            state = None if foreign else self._load(source, self._named)
        except (OSError, MemoryError):
            raise
        except Exception:  # whatever a damaged pickle leads to; torch's messages advise to run what is in the file
            raise self._damaged() from None
        if foreign is not None:
            raise ValueError(
                f"{self.where} names {foreign}, which no checkpoint has a use for: nothing of it was run; do not trust "
                "this file"
            )
        try:
            return self._parse(state)
        except RecursionError:
            raise self._damaged() from None

    def _damaged(self) -> ValueError:
        reason = "it is damaged, or no file that Megatron-LM saved"
        return ValueError(f"{self.where} cannot be read as a Megatron-LM checkpoint ({reason}): copy it again")

    def _load(self, source: Path | IO[bytes], named: set[str]) -> Any:
        if not isinstance(source, Path):
            source.seek(0)
        stand_ins: list[Any] = [(_StandIn, name) for name in named - {"collections.defaultdict"}]
        with _only_safe([*stand_ins, (_empty_dict, "collections.defaultdict")]):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=self._mapped)

    def _parse(self, state: Any) -> Content:
        chunks = [key for key in state if _CHUNK.fullmatch(str(key))] if isinstance(state, dict) else []
        if not chunks:
            raise ValueError(f"{self.where} holds no model: give a file that Megatron-LM saved, with its weights")
        args = state.get("args")
        fields = args.fields if isinstance(args, _StandIn) else args if isinstance(args, dict) else {}
        fields = {name: value for name, value in fields.items() if value is None or isinstance(value, _PLAIN)}
        version, iteration = state.get("checkpoint_version", 0), state.get("iteration", state.get("total_iters"))
        if isinstance(version, bool) or version not in (0, 1, 2, 3):
            raise ValueError(f"{self.where} has checkpoint_version {version}: 0, 1, 2 and 3 can be read")
        tensors = {}
        for chunk in sorted(chunks, key=lambda name: int(name.removeprefix("model") or 0)):
            tensors[chunk] = dict(self._flat(state[chunk], ""))
        return Content(fields, float(version), iteration if isinstance(iteration, int) else None, tensors)

    def _flat(self, tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of nested dictionaries, under their keys joined by dots."""
        if isinstance(tree, Tensor):
            yield prefix.removesuffix("."), tree
        elif isinstance(tree, Mapping):
            for key, value in tree.items():
                # Transformer Engine keeps fp8's scaling factors as extra state; data parallelism wraps in a module.
                if not str(key).endswith("_extra_state"):
                    yield from self._flat(
                        value, prefix if key == "module" else f"{prefix}{key}.".removeprefix("module.")
                    )
        else:
            name = prefix.removesuffix(".") or "its model"
            raise ValueError(f"{self.where}: {name} is a {type(tree).__name__}, where tensors should be")


@contextlib.contextmanager
def _only_safe(allowed: list[Any]) -> Iterator[None]:
    """Allow the unpickler these beside torch's own, and not what libraries in this process have declared safe: that
    would come before a stand-in."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(allowed)
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


class Parts:
    """All files of one checkpoint: [tensor rank][pipeline stage]."""

    def __init__(self, path: Path) -> None:
        """``path``: a file, a zip with files of Megatron-LM, the folder of one iteration, or one of several with a
        tracker file.  ValueError: there is no checkpoint there, or not all of its parts."""
        self.where, self._files = str(path), _find(path)
        self.tensor = 1 + max(t for t, _ in self._files)
        self.pipeline = 1 + max(p for _, p in self._files)
        self._touched = 0
        for t in range(self.tensor):
            for p in range(self.pipeline):
                if (t, p) not in self._files:
                    raise ValueError(f"{path} lacks the file of tensor rank {t}, pipeline stage {p}: copy it whole")

    def file(self, tensor: int, pipeline: int) -> PartFile:
        return self._files[tensor, pipeline]

    def files(self) -> list[PartFile]:
        return [self._files[key] for key in sorted(self._files)]

    def tensor_of(self, tensor: int, pipeline: int, chunk: str, key: str) -> Tensor:
        """One tensor, which may lie in a mapped file: its values are read where they are used."""
        return self._files[tensor, pipeline].content().chunks[chunk][key]

    def about_to_read(self, size: int) -> None:
        """Say that values of so many bytes will be used.  Little of the files stays in memory, if no tensor is kept."""
        self._touched += size
        if self._touched > _TOUCHED:
            self._touched = size
            for file in self._files.values():
                file.forget()


def _find(path: Path) -> dict[tuple[int, int], PartFile]:
    if path.is_file():
        return _in_zip(path) or {(0, 0): PartFile(str(path), path)}
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give a file or a folder of a Megatron-LM checkpoint")
    folder = _iteration(path)
    found = {}
    for name in _MODEL_FILES:
        if (folder / name).is_file():
            return {(0, 0): PartFile(str(folder / name), folder / name)}
        for file in sorted(folder.glob(f"*/{name}")):
            key = _ranks(file.parent.name, str(folder))
            if key in found:
                raise ValueError(f"{folder} has two files of tensor rank {key[0]}, pipeline stage {key[1]}: leave one")
            found[key] = PartFile(str(file), file)
    if found:
        return found
    if any((folder / name).exists() for name in ("metadata.json", ".metadata", "common.pt")):
        raise ValueError(
            f"{folder} is in the distributed format of Megatron-core: have Megatron-LM write it in the other one with "
            "--ckpt-convert-format torch --ckpt-convert-save FOLDER, and give that folder"
        )
    raise ValueError(f"{folder} has no mp_rank_…/{_MODEL_FILES[0]}: give a folder iter_… or release of Megatron-LM")


def _iteration(path: Path) -> Path:
    """The folder of the iteration that the tracker file names, if there is one."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{tracker} is damaged: it should hold a number or the word release")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise ValueError(
            f"{tracker} names {folder.name}, which is missing: copy it, or give another iteration's folder"
        )
    return folder


def _ranks(name: str, where: str) -> tuple[int, int]:
    match = _PART.fullmatch(name)
    if match is None:
        raise ValueError(f"{where} has a part named {name}, where mp_rank_00, mp_rank_00_000 and so on should be")
    if match[3] is not None:
        raise ValueError(f"{where} has a part named {name}, of a model split into experts: there is no such BERT here")
    return int(match[1]), int(match[2] or 0)


def _in_zip(path: Path) -> dict[tuple[int, int], PartFile]:
    """The files of a zip of released weights; none, if it is another file."""
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if PurePosixPath(name).name in _MODEL_FILES]
    if len({PurePosixPath(name).parent.parent for name in names}) > 1:
        raise ValueError(f"{path} has several checkpoints, such as {names[0]}: unpack it and give one's folder")

    def opened(name: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)

    found = {}
    for name in names:
        part = PurePosixPath(name).parent.name
        found[_ranks(part, str(path))] = PartFile(f"{path}/{name}", functools.partial(opened, name))
    return found


def _named(source: Path | IO[bytes]) -> set[str]:
    """The classes and functions that the pickles of a torch file name.  Nothing is unpickled."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            return {found for name in names for found in _globals(io.BytesIO(archive.read(name)))}
    if isinstance(source, Path):
        with source.open("rb") as file:
            return _of_old_file(file)
    source.seek(0)
    return _of_old_file(source)


def _of_old_file(file: IO[bytes]) -> set[str]:
    return {found for _ in range(_PICKLES_OF_OLD_FILE) for found in _globals(file)}


def _globals(file: IO[bytes]) -> Iterator[str]:
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "STACK_GLOBAL":
            raise pickle.UnpicklingError("a protocol that torch does not write")
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"


def _is_expected(name: str) -> bool:
    module, _, last = name.rpartition(".")
    package = name.partition(".")[0]
    return last in _BUILTINS if module == "builtins" else package not in sys.stdlib_module_names or package in _MODULES
