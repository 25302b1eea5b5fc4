"""What the device can do, and how much of it a run uses."""

from __future__ import annotations

import re
import resource

import torch
import torch.distributed as dist

from ..parallel.mesh import Mesh

# Dense bfloat16 matrix FLOP/s of one device, from NVIDIA's data sheets (which often print twice this, with 2:4
# sparsity): A100, A30, A40, A10, H100 (SXM, PCIe, NVL), H200 (SXM, NVL), GH200, L4, L40, L40S, HGX B200 and B300,
# GB200 NVL72; Ada and GA102 architecture white papers for the GeForce and RTX cards (float32 accumulation).
# The first pattern found in torch.cuda.get_device_name decides, so the particular comes before the general.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500e12),
    (r"\bB[23]00\b", 2250e12),
    (r"\bH200 NVL\b", 835.5e12),
    (r"\bH100 NVL\b", 835.5e12),
    (r"\bH100 PCIe\b", 756.5e12),
    (r"\bG?H[12]00\b", 989.5e12),
    (r"\bA100\b", 312e12),
    (r"\bA30\b", 165e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 6000 Ada\b", 364.2e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 4090$", 165.2e12),
    (r"\bRTX 3090$", 71e12),
)


def peak_flops_per_second(device_name: str | None) -> float | None:
    """Dense bfloat16 FLOP/s of the device that ``torch.cuda.get_device_name`` calls so; None where unknown.

    A CPU (None) and a MIG slice, which has only a share of its device, are unknown.
    """
    if device_name is None or re.search(r"\bMIG\b", device_name):
        return None
    return next((peak for pattern, peak in _PEAK_FLOPS if re.search(pattern, device_name)), None)


def model_flops_utilization(flops_per_second_per_device: float, peak: float | None) -> float | None:
    """Share of the device's bfloat16 peak that the model's own FLOPs use (PaLM, arXiv 2204.02311, appendix B).

    Recomputed activations do not count as the model's FLOPs.  None where the peak is unknown.
    """
    return None if peak is None else flops_per_second_per_device / peak


def utilization(flops_per_second: float, mesh: Mesh) -> float | None:
    """Model FLOPs utilization of a run whose ranks together do so many; None where the device's peak is unknown."""
    name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else None
    return model_flops_utilization(flops_per_second / mesh.size, peak_flops_per_second(name))


def peak_memory(mesh: Mesh) -> int:
    """The largest over the ranks: of the device, or of the process where there is no GPU."""
    if mesh.device.type == "cuda":
        local = torch.cuda.max_memory_allocated(mesh.device)
    else:
        local = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.tensor([local], dtype=torch.int64, device=mesh.device)
    if mesh.size > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak.item())
