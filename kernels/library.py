"""A compiled library and how its functions are called: with tensors, numbers, and nothing of torch's C++ side.

The types of a function's parameters are read from its one-line declaration in the source (see native/device.h), so a
call cannot disagree with it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .toolchain import BuildError

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_DECLARATION = re.compile(r"^FARSPAN_EXPORT int (\w+)\((.*)\) \{$", re.MULTILINE)
_TYPES = {
    "const void*": ctypes.c_void_p,
    "void*": ctypes.c_void_p,
    "int64_t": ctypes.c_int64,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


class Library:
    """The functions of a library; see ``call``."""

    def __init__(self, path: Path, sources: Iterable[Path], *, threads: bool) -> None:
        """``threads``: functions take a number of threads last, else a stream.  BuildError: it cannot be loaded."""
        self.path, self.threads = path, threads
        try:
            self._native = ctypes.CDLL(str(path))
            self._error = self._native.farspan_error
            self._functions = {name: self._function(name, types) for name, types in declarations(sources).items()}
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} cannot be loaded: {error}") from error
        self._error.argtypes, self._error.restype = [ctypes.c_int], ctypes.c_char_p

    def _function(self, name: str, types: list[str]) -> Any:
        function = getattr(self._native, name)
        function.argtypes, function.restype = [_TYPES[kind] for kind in types], ctypes.c_int
        return function

    def call(self, function: str, *arguments: Tensor | int | float | None) -> None:
        """Tensors go as their first number's address, None as none; the stream or the threads are added.

        RuntimeError: what the function reports.
        """
        device: torch.device | None = None
        native: list[int | float | None] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                device = device or argument.device
                if argument.device != device:
                    raise RuntimeError(f"{function}: tensors on {device} and {argument.device}")
                native.append(argument.data_ptr())
            else:
                native.append(argument)
        if device is None:
            raise TypeError(f"{function} was given no tensor")
        if self.threads:
            code = self._functions[function](*native, torch.get_num_threads())
        elif device.type == "cuda":
            with torch.cuda.device(device):
                code = self._functions[function](*native, torch.cuda.current_stream(device).cuda_stream)
        else:
            code = self._functions[function](*native, None)
        if code:
            raise RuntimeError(f"{function}: {self.error(code)}")

    def error(self, code: int) -> str:
        return self._error(code).decode(errors="replace")

    def probe(self) -> None:
        """BuildError: the device's driver does not run what the compiler made."""
        if code := self._native.farspan_probe():
            raise BuildError(f"{self.path} does not run on this machine: {self.error(code)}")

    def emulate_in_order(self, order: int) -> None:
        """Of an emulated library: how threads and blocks are ordered (native/emulator.h)."""
        self._native.emulator_order(ctypes.c_uint64(order))


def declarations(sources: Iterable[Path]) -> dict[str, list[str]]:
    """{function: types of its parameters} of the sources' launchers."""
    found = {}
    for source in sources:
        for name, parameters in _DECLARATION.findall(source.read_text()):
            found[name] = [parameter.strip().rsplit(" ", 1)[0] for parameter in parameters.split(",")]
    return found
