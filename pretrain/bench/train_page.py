"""The page of `farspan bench train`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .about import bullets
from .train_measure import OURS, THEIRS
from .train_models import Setup

NOT_MEASURED, NONE = "not measured", "–"
PAGE = "train"
COMMAND = "farspan bench train --out benchmarks --replace"
# Model FLOPs utilization on one H200 in bfloat16.
GATES = {Setup("megatron-bert", "large", 512): 0.45, Setup("roberta-prelayernorm", "large", 512): 0.45}
NAMES = {"cuda": "On a GPU", "cpu": "On a CPU"}


def lines_of(results: dict[str, Any]) -> list[str]:
    """The page in Markdown; ``results``: by device, each {"about", "rows"}, as in train.json."""
    lines = [
        "# Training steps",
        "",
        "Forward, backward, clipping and AdamW with float32 masters, through the engine that `farspan train` runs, on",
        "full rows of random words of which 15% are predicted; bfloat16 on a GPU and float32 on a CPU. Beside it",
        "`transformers` with the fastest attention that its class has, of the same sizes, rows, dropout and dtype",
        "(weights and fused AdamW in that dtype), in one run. MFU: the model's own FLOPs against the device's dense",
        "bfloat16 peak.",
        f"`{COMMAND}`",
        "",
        "## The gate",
        "",
        "| model, one H200, bfloat16 | target, MFU | measured | verdict |",
        "|---|---|---|---|",
    ]
    gpu = results.get("cuda")
    for setup, least in GATES.items():
        value = mfu(gpu, setup)
        shown = NOT_MEASURED if value is None else f"{value:.1%}"
        lines.append(f"| {setup.name} | ≥ {least:.0%} | {shown} | {gate_verdict(value, least)} |")
    for device in ("cuda", "cpu"):
        lines += ["", f"## {NAMES[device]}", ""]
        section = results.get(device)
        lines += _section(section) if section else [f"{NOT_MEASURED.capitalize()}."]
    return lines


def mfu(section: dict[str, Any] | None, setup: Setup) -> float | None:
    """Of Farspan's step, where it was measured and the device's peak is known."""
    for row in section["rows"] if section else []:
        if Setup(row["architecture"], row["size"], row["length"]) == setup:
            value = row[OURS].get("model_flops_utilization")
            return None if value is None else float(value)
    return None


def gate_verdict(value: float | None, least: float) -> str:
    if value is None:
        return NOT_MEASURED
    return "met" if value >= least else f"missed by {(least - value) * 100:.1f} points"


def _section(section: dict[str, Any]) -> list[str]:
    columns = (
        "model, length | side | attention | rows | step | tokens/s | TFLOP/s | MFU | peak memory | Farspan is faster by"
    )
    lines = [*bullets(section["about"]), "", f"| {columns} |", "|---" * 10 + "|"]
    for row in section["rows"]:
        name = f"{row['architecture']} {row['size']}, {row['length']:,}"
        for side in (OURS, THEIRS):
            if side in row:
                lines.append(_line([name, side, *_cells(row[side]), _faster(row) if side == THEIRS else NONE]))
    for row in section["rows"]:
        if profile := row[OURS].get("profile"):
            lines += ["", f"{row['architecture']} {row['size']} at {row['length']:,}, one step:", ""]
            lines += ["| operation | ms | share | calls |", "|---|---|---|---|"]
            lines += [
                _line([p["operation"], f"{p['seconds'] * 1e3:.2f}", f"{p['share']:.1%}", str(p["calls"])])
                for p in profile
            ]
    return lines


def _cells(side: dict[str, Any]) -> list[str]:
    if "why" in side:
        return [side["why"], *[NONE] * 6]
    share = side["model_flops_utilization"]
    return [
        side["attention"], str(side["rows"]), f"{side['step_seconds'] * 1e3:,.0f} ms",
        f"{side['tokens_per_second']:,.0f}", f"{side['flops_per_second'] / 1e12:.3g}",
        NONE if share is None else f"{share:.1%}", f"{side['peak_memory_bytes'] / 2**30:.1f} GiB",
    ]  # fmt: skip


def _faster(row: dict[str, Any]) -> str:
    ours, theirs = row[OURS], row[THEIRS]
    if "why" in ours or "why" in theirs:
        return NONE
    return f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}×"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
