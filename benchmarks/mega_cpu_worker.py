"""One side of ``mega_cpu.py``: a MEGA layer of Farspan or of transformers 4, in a process of its own.

    python benchmarks/mega_cpu_worker.py farspan|transformers THREADS DROPOUT FOLDER

Reads a command a line, [name, arguments...] in JSON, and answers each with a line of JSON.  Knows only torch and the
side that it is asked for: the other one may not be installed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 512, "num_hidden_layers": 1, "intermediate_size": 1024,
    "shared_representation_size": 128, "nffn_hidden_size": 1024, "ema_projection_size": 16, "bidirectional": True,
    "use_chunking": True, "chunk_size": 128, "relative_positional_bias": "rotary", "attention_activation": "softmax",
}  # fmt: skip
DROPOUTS = ("dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob", "nffn_activation_dropout_prob")


class FarspanLayer:
    def __init__(self, fields: dict[str, Any], folder: Path) -> None:
        from farspan.parallel.memory import keep_freed_memory
        from farspan.parallel.mesh import Mesh
        from farspan.parallel.sharding import initialize
        from farspan.pretrain.conversion.imported import build
        from farspan.pretrain.conversion.renaming import rename
        from farspan.pretrain.models.mega import Mega, MegaConfig

        keep_freed_memory()  # as a run on a CPU does (Mesh.create)
        config = MegaConfig(**fields)
        self.chunk, self.dropout = config.chunk_size, config.dropout_prob
        self.mesh = Mesh.solo()
        self.model = build(Mega, config, ())
        initialize(self.model, 1, self.mesh.tensor)
        self.layer: Any = self.model.layers["0"]
        self.contexts: dict[int, Any] = {}
        if not (folder / "weights.pt").exists():
            weights = {name: p.detach() for name, p in self.model.named_parameters()}
            renamed = rename(weights, Mega.huggingface_keys(config, ())) | Mega.huggingface_constants(config, ())
            prefix = "layers.0."
            of_layer = {n.removeprefix(prefix): w for n, w in renamed.items() if n.startswith(prefix)}
            torch.save(of_layer, folder / "weights.pt")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self._context(len(x)))

    def average(self, x: Tensor) -> Tensor:
        """The moving average alone, with its residual and activation."""
        return self.layer.attention.ema(x, self._context(len(x)), None)[0]

    def _context(self, length: int) -> Any:
        """Of one row: made once a microbatch, for all layers."""
        from farspan.kernels.dropout import DropoutKey
        from farspan.pretrain.batch import Batch
        from farspan.pretrain.models.base import Context

        if length not in self.contexts:
            zeros, row = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            batch = Batch(
                input_ids=zeros, document_ids=zeros + 1, positions=torch.arange(length).unsqueeze(0),
                token_type_ids=zeros, sample_ids=row, attention="full", labels=zeros, label_weights=zeros,
            )  # fmt: skip
            self.contexts[length] = Context.of(
                batch, self.mesh, causal=False, dropout=DropoutKey(1, 1, row) if self.dropout else None,
                attention_chunk=self.chunk,
            )  # fmt: skip
        return self.contexts[length]


class TransformersLayer:
    def __init__(self, fields: dict[str, Any], folder: Path) -> None:
        from transformers import MegaConfig
        from transformers.models.mega.modeling_mega import MegaBlock

        self.layer = MegaBlock(MegaConfig(**fields)).train()
        self.layer.load_state_dict(torch.load(folder / "weights.pt"), strict=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]

    def average(self, x: Tensor) -> Tensor:
        return self.layer.mega_layer.ema_gate(x)


class Side:
    """The commands."""

    def __init__(self, kind: str, threads: int, dropout: float, folder: Path) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        self.folder = folder
        kinds: dict[str, Any] = {"farspan": FarspanLayer, "transformers": TransformersLayer}
        self.model = kinds[kind](SIZES | dict.fromkeys(DROPOUTS, dropout), folder)
        self.inputs: dict[int, tuple[Tensor, Tensor]] = {}

    def versions(self) -> dict[str, str]:
        import importlib.metadata

        return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}

    def time(self, length: int, steps: int, part: str = "forward") -> float:
        """Seconds of a forward and backward pass, the median of ``steps``."""
        return statistics.median(_seconds(lambda: self._pass(length, part)) for _ in range(steps))

    def memory(self, length: int) -> int:
        """Bytes by which a pass raises the peak of resident memory over what is held with model and input ready."""
        self._input(length)
        before = _resident("VmRSS")
        self._pass(length)
        return _resident("VmHWM") - before

    def save(self, length: int) -> None:
        """Output and gradients, for ``differ`` of the other side."""
        torch.save(self._results(length), self.folder / "results.pt")

    def differ(self) -> dict[str, float]:
        """The largest difference from what was saved, relative to the largest value."""
        theirs = torch.load(self.folder / "results.pt")
        found = self._results(len(theirs["output"]))
        return {name: ((found[name] - value).abs().max() / value.abs().max()).item() for name, value in theirs.items()}

    def _results(self, length: int) -> dict[str, Tensor]:
        output = self._pass(length).detach()
        gradient = self._input(length)[0].grad
        assert gradient is not None
        return {"output": output, "input gradient": gradient}

    def _pass(self, length: int, part: str = "forward") -> Tensor:
        x, upstream = self._input(length)
        x.grad = None
        self.model.layer.zero_grad()
        y: Tensor = getattr(self.model, part)(x)
        y.backward(upstream)
        return y

    def _input(self, length: int) -> tuple[Tensor, Tensor]:
        if length not in self.inputs:
            generator = torch.Generator().manual_seed(length)
            x, upstream = (torch.randn(length, 1, SIZES["hidden_size"], generator=generator) for _ in range(2))
            self.inputs[length] = x.requires_grad_(), upstream
        return self.inputs[length]


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _resident(name: str) -> int:
    """VmRSS or VmHWM (the peak) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    kind, threads, dropout, folder = sys.argv[1:]
    side = Side(kind, int(threads), float(dropout), Path(folder))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(side, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
