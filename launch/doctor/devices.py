"""The GPUs, their driver, and NCCL: by torch, and by nvidia-smi where there is one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from typing import Any

import torch

from ..tables import size, table
from .clashes import loaded_nccl
from .report import Section

SMI_SECONDS = 15.0  # a driver that does not answer must not hold the page
# The oldest driver for programs of a CUDA release of this major version: docs.nvidia.com/deploy/cuda-compatibility,
# minor version compatibility, table 1.
MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
_FIELDS = (
    "index", "uuid", "name", "driver_version", "memory.total", "memory.used", "temperature.gpu", "power.draw",
    "power.limit", "persistence_mode", "ecc.mode.current", "ecc.errors.uncorrected.volatile.total", "compute_mode",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Smi:
    """What nvidia-smi says.  ``problem``: why it says nothing, None: it is not there, or it said all."""

    present: bool
    gpus: list[dict[str, str]]
    processes: list[dict[str, str]]
    problem: str | None = None

    @staticmethod
    def ask() -> Smi:
        program = shutil.which("nvidia-smi")
        if program is None:
            return Smi(False, [], [])
        try:
            gpus = _query(program, "--query-gpu", _FIELDS)
            processes = _query(program, "--query-compute-apps", ("gpu_uuid", "pid", "used_memory", "process_name"))
        except subprocess.TimeoutExpired:
            return Smi(True, [], [], f"nvidia-smi did not answer within {SMI_SECONDS:.0f} s")
        except (OSError, ValueError) as error:
            return Smi(True, [], [], f"nvidia-smi fails: {error}")
        return Smi(True, gpus, processes)

    @property
    def driver(self) -> str | None:
        return self.gpus[0]["driver_version"] if self.gpus else None


def _query(program: str, what: str, fields: tuple[str, ...]) -> list[dict[str, str]]:
    """A line of comma-separated values for each GPU or process.  ValueError with its own words where it fails."""
    command = [program, f"{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    if done.returncode:
        raise ValueError(" ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}")
    rows = [[cell.strip() for cell in line.split(",", len(fields) - 1)] for line in done.stdout.splitlines() if line]
    if any(len(row) != len(fields) for row in rows):
        raise ValueError(f"its answer to {what} is not understood: {done.stdout.splitlines()[0]!r}")
    return [dict(zip(fields, row, strict=True)) for row in rows]


def look(section: Section) -> None:
    smi = Smi.ask()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    section.facts |= {
        "cuda_of_torch": torch.version.cuda, "driver": smi.driver, "gpus": [], "nvidia_smi": smi.gpus,
        "processes": smi.processes, "nccl": None,
    }  # fmt: skip
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    section.say(f"{built}; driver {smi.driver}" if smi.driver else built)
    if smi.problem:
        section.fault(
            smi.problem,
            "a driver that does not answer fails, or hangs, a run at its start",
            "see dmesg for NVRM and Xid lines; restart the driver or the machine",
        )
    _driver_fits(section, smi)
    if count == 0:
        _no_gpu(section, smi)
        return
    for i in range(count):
        section.facts["gpus"].append(_describe(section, i))
    section.facts["gpu_names"] = [gpu["name"] for gpu in section.facts["gpus"]]
    if len({(gpu["name"], gpu["memory_bytes"]) for gpu in section.facts["gpus"]}) > 1:
        section.warn(
            "the GPUs of this machine differ: " + ", ".join(gpu["name"] for gpu in section.facts["gpus"]),
            "every step waits for the slowest, and the smallest memory is the limit of all",
            "choose equal ones with CUDA_VISIBLE_DEVICES",
        )
    for gpu in smi.gpus:
        _state(section, gpu, smi.processes)
    _links(section, count)
    _nccl(section)


def _describe(section: Section, index: int) -> dict[str, Any]:
    it = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    gpu = {
        "index": index, "name": it.name, "capability": f"{it.major}.{it.minor}", "memory_bytes": total,
        "memory_free_bytes": free, "processors": it.multi_processor_count,
    }  # fmt: skip
    section.say(f"GPU {index}: {it.name}, capability {it.major}.{it.minor}, {size(total)}, {size(free)} free")
    compiled = torch.cuda.get_arch_list()
    if compiled and not any(_runs(name, (it.major, it.minor)) for name in compiled):
        section.fault(
            f"torch {torch.__version__} has no code for GPU {index} ({it.name}, sm_{it.major}{it.minor}), only for "
            + ", ".join(compiled),
            "the first operation there fails with: no kernel image is available",
            "install a build of torch for this GPU",
        )
    if free < 0.9 * total:
        section.warn(
            f"GPU {index} has {size(free)} of {size(total)} free",
            "a run that needs all of it runs out of memory",
            "see with nvidia-smi whose process has it, and end that",
        )
    return gpu


def _runs(name: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code of such a name: of its own major version and no later minor one, or, translated from
    intermediate code, of any earlier one (CUDA C++ Programming Guide, Application Compatibility)."""
    kind, _, number = name.partition("_")
    digits = "".join(letter for letter in number if letter.isdigit())
    if len(digits) < 2 or not digits.isdigit():
        return True  # of a form that is not known here
    made_for = int(digits[:-1]), int(digits[-1])
    return made_for <= capability and (kind == "compute" or made_for[0] == capability[0])


def _driver_fits(section: Section, smi: Smi) -> None:
    if not (smi.driver and torch.version.cuda):
        return
    major = int(torch.version.cuda.split(".")[0])
    least = MINIMUM_DRIVER.get(major)
    if least is not None and int(smi.driver.split(".")[0]) < least:
        section.fault(
            f"torch is built for CUDA {torch.version.cuda}, which needs driver {least} or newer; here is {smi.driver}",
            "torch sees no GPU with it",
            f"install driver {least} or newer, or a build of torch for an older CUDA",
        )


def _no_gpu(section: Section, smi: Smi) -> None:
    section.say("no GPU: runs take the CPU")
    if not smi.gpus:
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        section.say(f"{len(smi.gpus)} GPUs are hidden by CUDA_VISIBLE_DEVICES={hidden!r}")
    elif torch.version.cuda is None:
        section.warn(
            f"this machine has {len(smi.gpus)} GPUs and torch is built without CUDA",
            "runs take the CPU",
            "install torch's build for CUDA",
        )
    else:
        section.fault(
            f"nvidia-smi shows {len(smi.gpus)} GPUs and torch sees none",
            "runs take the CPU, a hundred times as slow",
            'see python -c "import torch; torch.cuda.init()" for the reason (driver, /dev/nvidia*, container)',
        )


def _state(section: Section, gpu: dict[str, str], processes: list[dict[str, str]]) -> None:
    name = f"GPU {gpu['index']}"
    mine = [p for p in processes if p["gpu_uuid"] == gpu["uuid"]]
    section.say(
        f"{name}: {gpu['temperature.gpu']} °C, {gpu['power.draw']} of {gpu['power.limit']} W, persistence "
        f"{gpu['persistence_mode']}, ECC {gpu['ecc.mode.current']}, {gpu['compute_mode']}"
    )
    errors = gpu["ecc.errors.uncorrected.volatile.total"]
    if errors.isdigit() and int(errors) > 0:
        section.fault(
            f"{name} has had {errors} memory errors that could not be corrected since its driver started",
            "what it computes may be wrong, and the next one ends the run",
            "take the node out, and reset the GPU or have it replaced (nvidia-smi -q -d ECC,ROW_REMAPPER)",
        )
    if _number(gpu["temperature.gpu"]) >= 85:
        section.warn(
            f"{name} is at {gpu['temperature.gpu']} °C",
            "it lowers its clock, and every other rank waits for it",
            "see to its cooling",
        )
    if gpu["compute_mode"] == "Prohibited":
        section.fault(f"{name} is in compute mode Prohibited", "no process may use it", "nvidia-smi -c DEFAULT")
    if gpu["persistence_mode"] == "Disabled":
        section.warn(
            f"{name} has persistence mode off",
            "the driver is loaded anew, for seconds, whenever the last process ends",
            "nvidia-smi -pm 1, or start nvidia-persistenced",
        )
    for process in mine:
        section.warn(
            f"{name} is used by process {process['pid']} ({process['process_name']}, {process['used_memory']} MiB)",
            "two programs share its time and memory",
            "end it if it was left over from an earlier run",
        )


def _links(section: Section, count: int) -> None:
    """Which pairs of GPUs reach each other's memory, and by what, as nvidia-smi draws it."""
    if count < 2:
        return
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    without = [f"{i}–{j}" for i, j in pairs if i < j and not torch.cuda.can_device_access_peer(i, j)]
    section.facts["pairs_without_peer_access"] = without
    section.say(f"peer access between GPUs: {'all pairs' if not without else 'not for ' + ', '.join(without)}")
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return
    rows = [line.split("\t") for line in done.stdout.splitlines() if line.strip().startswith("GPU")]
    matrix = [[row[0].strip(), *(cell.strip() for cell in row[1 : count + 1])] for row in rows]
    section.facts["links"] = {row[0]: row[1:] for row in matrix if row[0]}
    for line in table(matrix):
        section.say(line)


def _nccl(section: Section) -> None:
    version = loaded_nccl()
    if version is None and torch.distributed.is_nccl_available():
        version = torch.cuda.nccl.version()
    section.facts["nccl"] = None if version is None else ".".join(map(str, version))
    section.say(f"NCCL {section.facts['nccl'] or 'is not in this torch'}")
    if version is None:
        section.fault(
            "this torch has no NCCL", "ranks on GPUs cannot talk to each other", "install torch's own build for CUDA"
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0  # "[N/A]"
