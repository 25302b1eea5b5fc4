"""The layout contract, measured: one run in every layout, each step's loss and gradient norm against a single rank's.

Dropout 0.1 on hidden states and attention, real text in packed rows, up to four ranks on a CPU.  In float32 every step
must agree to 1e-4; in bfloat16 the runs must stay closer to the single rank's than two seeds are to each other.

    python benchmarks/layouts.py [--model roberta-prelayernorm] [--steps 200] [--dtypes float32 bfloat16]
                                 [--layouts TP2 …] [--out benchmarks/layouts]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]

from farspan.benchmarks.about import about, bullets  # noqa: E402
from farspan.launch.local import run_ranks  # noqa: E402

LIMIT = 1e-4  # float32, relative, every step
OFFLOAD = {"parallel.offload_optimizer": True}
SEQUENCE = {"parallel.tensor": 2, "parallel.sequence": True}
INTERLEAVED = {"parallel.pipeline": 2, "parallel.virtual_stages": 2}


def _zero(stage: int) -> dict[str, Any]:
    return {"parallel.data": 2, "parallel.zero_stage": stage}


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"parallel.tensor": 2},
    "TP2 + SP": SEQUENCE,
    "PP2": {"parallel.pipeline": 2},
    "PP2 interleaved": INTERLEAVED,
    "DP2, ZeRO 0": _zero(0),
    "DP2, ZeRO 1": _zero(1),
    "DP2, ZeRO 2": _zero(2),
    "DP2, ZeRO 3": _zero(3),
    "ZeRO 1, offload": {"parallel.zero_stage": 1} | OFFLOAD,
    "DP2, ZeRO 1, offload": _zero(1) | OFFLOAD,
    "DP2, ZeRO 3, offload": _zero(3) | OFFLOAD,
    "TP2 × PP2": {"parallel.tensor": 2, "parallel.pipeline": 2},
    "TP2 × PP2 + SP": SEQUENCE | {"parallel.pipeline": 2},
    "TP2 × PP2 interleaved + SP": SEQUENCE | INTERLEAVED,
    "TP2 × DP2, ZeRO 1": {"parallel.tensor": 2} | _zero(1),
    "PP2 × DP2, ZeRO 1": {"parallel.pipeline": 2} | _zero(1),
    "microbatch halved": {"training.micro_batch_size": 2},
    "selective recomputation": {"training.recompute": "selective"},
    "full recomputation": {"training.recompute": "full"},
    "DP2, ZeRO 3, full recomputation": _zero(3) | {"training.recompute": "full"},
}

Steps = list[tuple[float, float]]  # (loss, gradient norm)


def ranks_of(overrides: dict[str, Any]) -> int:
    product = 1
    for axis in ("tensor", "pipeline", "data"):
        product *= int(overrides.get(f"parallel.{axis}", 1))
    return product


def worst(run: Steps, single: Steps) -> tuple[float, float]:
    """The largest relative difference of a step's loss, and of its gradient norm."""
    assert len(run) == len(single) > 0
    pairs = [[(a[i], b[i]) for a, b in zip(run, single, strict=True)] for i in range(2)]
    loss, norm = (max(abs(a - b) / abs(b) for a, b in column) for column in pairs)
    return loss, norm


class Trainer:
    """Runs ``farspan train`` on prepared text, and reads what it logged."""

    def __init__(self, folder: Path, steps: int, model: str) -> None:
        self.folder, self.steps = folder, steps
        text = ROOT / "launch/text/state-of-the-union-1934-1960.txt"
        prepare = ["prepare", str(folder / "data"), "--input", str(text), "--vocab-size", "1000", "--processes", "1"]
        if run_ranks(prepare, 1):
            raise SystemExit("the text could not be prepared")
        data = f"data: {{folder: set on the command line, sequence_length: {LENGTHS.get(model, 64)}}}\n"
        (folder / "run.yaml").write_text(f"model: {MODELS[model]}\n{data}{RECIPE}")

    def __call__(self, name: str, overrides: dict[str, Any]) -> Steps:
        run_dir = self.folder / name.replace(" ", "-")
        values = {"run_dir": run_dir, "data.folder": self.folder / "data", "training.steps": self.steps} | overrides
        values["schedule.warmup_steps"] = self.steps // 10
        arguments = ["train", str(self.folder / "run.yaml"), *(f"{key}={_yaml(v)}" for key, v in values.items())]
        if run_ranks(arguments, ranks_of(overrides)):
            raise SystemExit(f"{name} failed")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


_MEGA = (
    "model_type: mega, hidden_size: 64, num_hidden_layers: 4, intermediate_size: 128, nffn_hidden_size: 128, "
    "shared_representation_size: 32, ema_projection_size: 8"
)
_ENCODER = (
    "hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 128, "
    "max_position_embeddings: 512"
)
MODELS = {
    "roberta-prelayernorm": "{model_type: roberta-prelayernorm, hidden_size: 64, num_hidden_layers: 4, "
    "num_attention_heads: 4, intermediate_size: 128, max_position_embeddings: 66}",
    "mega": f"{{{_MEGA}}}",
    "mega-chunked": f"{{{_MEGA}, use_chunking: true, chunk_size: 16, attention_activation: laplace, "
    "relative_positional_bias: simple, use_feature_dropout: true, normalization_type: layernorm}",
    "mra": f"{{model_type: mra, {_ENCODER}, block_per_row: 1}}",
    "nystromformer": f"{{model_type: nystromformer, {_ENCODER}, num_landmarks: 16, conv_kernel_size: 9}}",
}
LENGTHS = {"mra": 128, "nystromformer": 128}  # of rows: several blocks, several tokens a landmark
RECIPE = """\
run_dir: set on the command line
training: {global_batch_size: 16, micro_batch_size: 4}
optimizer: {lr: 1.0e-3}
schedule: {name: linear}
logging: {interval: 1000, tensorboard: false}
spikes: {gradient_norm_factor: 0, loss_deviations: 0}
"""


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def measure(trainer: Trainer, dtype: str, layouts: list[str]) -> tuple[list[str], bool]:
    """The table of one precision, and whether every layout is within its limit."""
    kind = {"training.dtype": dtype}
    single = trainer(f"{dtype} 1 rank", kind)
    limit = (LIMIT, LIMIT)
    rows = [(f"1 rank (loss {single[0][0]:.3f} at first)", single, (0.0, 0.0))]
    if dtype != "float32":
        seed = trainer(f"{dtype} another seed", kind | {"training.seed": 4321})
        limit = worst(seed, single)
        rows.append(("1 rank, another seed", seed, limit))
    for name in layouts:
        run = trainer(f"{dtype} {name}", kind | LAYOUTS[name])
        rows.append((name, run, worst(run, single)))
    table = [
        "| layout | last loss | last gradient norm | worst difference: loss | gradient norm |",
        "|---|---|---|---|---|",
    ]
    for name, run, (loss, norm) in rows:
        table.append(f"| {name} | {run[-1][0]:.7f} | {run[-1][1]:.7f} | {loss:.1e} | {norm:.1e} |")
    held = all(found[0] <= limit[0] and found[1] <= limit[1] for _, _, found in rows)
    return table, held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="roberta-prelayernorm")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", metavar="PATH", help="write PATH.md")
    arguments = parser.parse_args()
    page = [
        f"# The layout contract, measured: {arguments.model}",
        "",
        f"{arguments.steps} steps of one run in every layout, dropout 0.1, MLM on real text in packed rows; the loss",
        "and gradient norm of every step against the single rank's (largest relative difference). TP: tensor ranks,",
        "SP: sequence parallelism, PP: pipeline ranks, DP: replicas. gloo, on a CPU.",
        f"`python benchmarks/layouts.py --model {arguments.model}`, model: `{MODELS[arguments.model]}`,",
        f"rows of {LENGTHS.get(arguments.model, 64)} tokens.",
        "",
        *bullets(about("torch", "megatron-core", "deepspeed")),
    ]
    held = True
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder), arguments.steps, arguments.model)
        for dtype in arguments.dtypes:
            table, within = measure(trainer, dtype, arguments.layouts)
            limit = "1e-4 at every step" if dtype == "float32" else "what two seeds differ by"
            page += ["", f"## {dtype}: limit {limit}, {'held' if within else 'NOT HELD'}", "", *table]
            held = held and within
    print("\n".join(page))
    if arguments.out:
        Path(f"{arguments.out}.md").write_text("\n".join([*page, ""]))
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
