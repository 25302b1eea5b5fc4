"""What nvcc's assembler says every kernel takes: registers a thread, bytes spilled.  The record is in tests/kernels.

python tests/support/resources.py      writes the record anew
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from farspan.kernels import forms, toolchain
from farspan.kernels.toolchain import Target

RECORD = Path(__file__).resolve().parents[1] / "kernels" / "resources.json"
ARCHITECTURES = ("sm_80", "sm_90")

Usage = dict[str, dict[str, int]]  # kernel → {"registers": …, "spilled": …}


def compile_all() -> dict[str, tuple[str, dict[str, Usage]]]:
    """{operation: (what the compiler said beside the report, {architecture: usage})}, two at a time."""
    names = [name for name, operation in forms.OPERATIONS.items() if operation.sources("cuda")]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(compile_operation, names), strict=True))


def compile_operation(name: str) -> tuple[str, dict[str, Usage]]:
    """As a run builds it, but for all architectures, and only as far as machine code."""
    target = Target("cuda", ARCHITECTURES[0])
    options = [flag for flag in toolchain.flags(target) if "gencode" not in flag and "arch=" not in flag]
    for architecture in ARCHITECTURES:
        number = architecture.removeprefix("sm_")
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        for source in forms.OPERATIONS[name].sources("cuda"):
            command = [
                toolchain.compiler(target),
                *options,
                f"-I{toolchain.HEADERS}",
                "-Xptxas",
                "-v",
                "-c",
                str(source),
            ]
            done = subprocess.run(
                [*command, "-o", f"{folder}/out.o"], capture_output=True, text=True, check=False, timeout=600
            )
            said += done.stdout + done.stderr
            assert done.returncode == 0, f"{source}:\n{said[-4000:]}"
    return parse(said)


def parse(said: str) -> tuple[str, dict[str, Usage]]:
    """The lines that are no report, and what is used."""
    found: dict[str, Usage] = {name: {} for name in ARCHITECTURES}
    rest, kernel, usage = [], "", dict[str, int]()
    for line in said.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            kernel = match[1]
            usage = found[match[2]].setdefault(kernel, {})
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            usage["spilled"] = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            usage["registers"] = int(match[1])
        elif not re.match(r"ptxas info|\s*$", line) and "Function properties" not in line:
            rest.append(line)
    names = _readable(sorted({kernel for usages in found.values() for kernel in usages}))
    return "\n".join(rest), {
        architecture: {names[kernel]: usage for kernel, usage in sorted(usages.items())}
        for architecture, usages in found.items()
    }


def _readable(mangled: list[str]) -> dict[str, str]:
    """Names as in the source, where there is c++filt to say so."""
    if not mangled or not (program := shutil.which("c++filt")):
        return {name: name for name in mangled}
    said = subprocess.run([program], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    readable = [line.replace("(anonymous namespace)::", "") for line in said.splitlines()]
    return {name: re.sub(r"^void |\(.*\)$", "", line) for name, line in zip(mangled, readable, strict=True)}


def record() -> dict[str, Any]:
    compiled = compile_all()
    nvcc = toolchain.release_of(toolchain.compiler(Target("cuda", ARCHITECTURES[0])))
    return {"compiler": nvcc, "operations": {name: usage for name, (_, usage) in compiled.items()}}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(), indent=1) + "\n")
    print(f"wrote {RECORD}", file=sys.stderr)
