"""How many bytes a configuration's model takes: on a rank, and in a checkpoint.

The model itself is built, without values, so that what is counted is what a run has.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ...parallel.mesh import Axis, Mesh, SoloGroup
from ...parallel.sharding import logical_of
from ...pretrain.config import Config
from ...pretrain.models import architecture
from ...pretrain.models.base import LanguageModel, Stage

_MASTER, _MOMENTS, _GRADIENT = 4, 8, 4  # bytes a parameter, all float32


@dataclasses.dataclass(frozen=True)
class RankBytes:
    """Of the rank that takes most, roughly; ``offloaded``: in host memory although it computes on a GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    offloaded: int = 0

    @property
    def state(self) -> int:
        """What is there all the time, whatever the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.activations


def parameters(config: Config) -> int:
    """Of the whole model, without the padding that layouts add."""
    model = _build(config, 1, Stage.whole(config.model))
    return sum(math.prod(logical_of(p).shape) for p in model.parameters() if p.requires_grad)


def checkpoint_bytes(config: Config) -> int:
    """A checkpoint: weights, for 16 bits their float32 masters, and the optimizer's two moments."""
    return parameters(config) * (_weight(config) + (_MASTER if _mixed(config) else 0) + _MOMENTS)


def kept_bytes(config: Config, already: int = 0) -> tuple[int, int]:
    """What checkpoints take beyond what is there: at least, and when the run is done.

    At least those of ``keep_last`` and ``keep_best`` and the one that is being written; in the end those of
    ``keep_every`` too, or all.  ``already``: how many are there.
    """
    checkpoint, steps = config.checkpoint, config.training.steps
    saves = -(-steps // checkpoint.interval) if checkpoint.interval else 1
    least = min(saves, max(checkpoint.keep_last, 1) + checkpoint.keep_best + 1)
    end = saves if checkpoint.keep_last == 0 else least
    if checkpoint.keep_every and checkpoint.interval:
        end = min(saves, end + steps // math.lcm(checkpoint.keep_every, checkpoint.interval))
    one = checkpoint_bytes(config)
    return max(1, least - already) * one, max(1, end - already) * one


def rank_bytes(config: Config, data: int) -> RankBytes:
    """``data``: replicas.  What ZeRO partitions over them: arXiv 1910.02054, section 5."""
    parallel, mixed, weight = config.parallel, _mixed(config), _weight(config)
    stages = [
        Stage.of(config.model, rank, parallel.pipeline, parallel.virtual_stages) for rank in range(parallel.pipeline)
    ]
    count = max(_held(_build(config, parallel.tensor, stage)) for stage in stages)
    partitioned = parallel.zero_stage > 0 and (data > 1 or parallel.offload_optimizer)
    zero = parallel.zero_stage if partitioned else 0
    weights = weight * count // (data if zero == 3 else 1)
    gradients = _GRADIENT * count // (data if zero >= 2 else 1)
    # DeepSpeed keeps a float32 copy of its part also where the weights are float32 themselves.
    masters = _MASTER if mixed or partitioned else 0
    optimizer = (masters + _MOMENTS) * count // (data if partitioned else 1)
    offloaded = optimizer if parallel.offload_optimizer else 0
    return RankBytes(weights, gradients, optimizer - offloaded, activation_bytes(config, data), offloaded)


def activation_bytes(config: Config, data: int) -> int:
    """Of a dense layer with attention that keeps no matrix of weights, and of the logits: a rough measure for the other
    architectures (arXiv 2205.05198, table 2, without the term of s²)."""
    model, training, parallel = config.model, config.training, config.parallel
    tokens, hidden = config.data.sequence_length * training.micro_batch_size, model.hidden_size
    bytes_of_two = _weight(config) / 2  # the paper's counts are of 16 bits
    if training.recompute == "full":
        layer = 2.0
    elif parallel.sequence:
        layer = 34 / parallel.tensor
    else:
        layer = 10 + 24 / parallel.tensor
    microbatches = max(1, training.global_batch_size // (training.micro_batch_size * data))
    layers = -(-model.num_hidden_layers // parallel.pipeline) * min(parallel.pipeline, microbatches)
    stack = layer * bytes_of_two * tokens * hidden * layers
    share = 1.0 if config.objective.name == "clm" else config.objective.probability
    logits = 4 * tokens * share * model.vocab_size / parallel.tensor
    return int(stack + logits)


def _mixed(config: Config) -> bool:
    return config.training.dtype != "float32"


def _weight(config: Config) -> int:
    return config.training.torch_dtype.itemsize


def _build(config: Config, tensor: int, stage: Stage) -> LanguageModel:
    """A stage, without values, whose parameters say what a tensor rank holds of them (their own shapes do not:
    megatron-core asks for process groups, which there are none)."""
    axis, one = Axis(0, tensor, SoloGroup()), Axis(0, 1, SoloGroup())
    mesh = Mesh(axis, one, one, axis, one.group, torch.device("meta"))
    with torch.device("meta"):
        return architecture(config.model.model_type)(config.model, mesh, stage=stage, heads=config.heads)


def _held(model: LanguageModel) -> int:
    """Values that a tensor rank holds, padding included."""
    return sum(math.prod(logical_of(p).local_shape(model.mesh.tensor)) for p in model.parameters())
