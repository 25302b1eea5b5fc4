"""The configuration of a run: typed, frozen, and checked as a whole before anything starts.

The model section uses Hugging Face's field names.  The resolved configuration is saved with the run.  ``config_file``
reads one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from ..kernels.forms import Mode
from ..parallel.loss_scale import LossScale
from .models import ARCHITECTURES, architecture
from .models.base import Recompute
from .models.config import ModelConfig
from .objectives import OBJECTIVES
from .schedule import BatchSizes, check_schedule
from .skips import Skip, ordered


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SkipConfig(Section):
    """Samples that are left out."""

    step: int = Field(..., gt=0, description="from this step on, counted from 1")
    samples: int = Field(..., gt=0, description="by so many rows the stream is further")


class DataConfig(Section):
    """Which prepared tokens are read, and how rows are made of them."""

    folder: str = Field(..., min_length=1, description="folder written by `farspan prepare`")
    sequence_length: int = Field(128, gt=1, description="tokens a row")
    rows: Literal["packed", "padded", "pairs"] = Field(
        "packed",
        description="packed: rows cut full from the stream of documents, each attending within itself; "
        "padded: one document a row; pairs: two segments a row (mlm+nsp and mlm+sop)",
    )
    prefetch_steps: int = Field(4, ge=1, description="global steps whose batches are made ahead, in a thread")
    skip: tuple[SkipConfig, ...] = Field(
        (),
        description="`[{step: 100, samples: 64}, …]`: what is left out of the stream of samples; several add up; a "
        "rollback adds one (docs/spikes.md)",
    )

    @property
    def skips(self) -> tuple[Skip, ...]:
        return ordered([Skip(skip.step, skip.samples) for skip in self.skip])


class ObjectiveConfig(Section):
    """What is predicted."""

    name: str = Field(
        "mlm",
        description="mlm: chosen tokens from both sides; clm: each next token; mlm+nsp and mlm+sop: masked tokens, and "
        "whether the second of two segments follows the first, or whether the two are in order",
    )
    probability: float = Field(0.15, gt=0.0, lt=1.0, description="share of tokens to predict (not clm)")
    mask_fraction: float = Field(0.8, ge=0.0, le=1.0, description="share of those replaced by the mask token")
    random_fraction: float = Field(0.1, ge=0.0, le=1.0, description="share of those replaced by a random token")

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.name not in OBJECTIVES:
            raise ValueError(f"name {self.name!r} is unknown: choose one of {', '.join(OBJECTIVES)}")
        if self.mask_fraction + self.random_fraction > 1.0:
            raise ValueError(
                f"mask_fraction {self.mask_fraction} + random_fraction {self.random_fraction} exceeds 1: lower one"
            )
        return self


class BatchRampConfig(Section):
    """Fewer rows a step at first, rising to ``training.global_batch_size``; as Megatron-LM's rampup-batch-size."""

    start: int = Field(..., gt=0, description="rows of the first step")
    increment: int = Field(..., gt=0, description="rows by which it rises each time")
    samples: int = Field(..., gt=0, description="rows that the ramp sees in all, in equal shares for its sizes")


class TrainingConfig(Section):
    """How long, how much at once, in which precision."""

    steps: int = Field(1000, gt=0, description="optimizer steps of the whole run")
    global_batch_size: int = Field(32, gt=0, description="rows an optimizer step sees, over all ranks")
    micro_batch_size: int = Field(8, gt=0, description="the most rows that go through a rank at once")
    seed: int = Field(1234, ge=0, lt=2**63, description="of initial values, order, masks and dropout")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of weights and activations; masters and accumulated gradients are float32"
    )
    initial_loss_scale: float = Field(
        65536.0, ge=1.0, le=LossScale.LARGEST, description="first factor of the loss (float16); halved at an overflow"
    )
    loss_scale_window: int = Field(1000, gt=0, description="steps without overflow after which the factor doubles")
    max_skipped_steps: int = Field(
        20, gt=0, description="steps in a row with a loss or gradient that is not finite (skipped) that end the run"
    )
    recompute: Recompute = Field(
        "none",
        description="activations computed again in the backward pass to save memory: none; selective: the core of "
        "attention; full: whole layers",
    )
    batch_ramp: BatchRampConfig | None = Field(None, description="a smaller global batch at the start of the run")
    gradient_clipping: float = Field(1.0, ge=0.0, description="largest global gradient norm; 0: none")
    timeout_seconds: float = Field(1800.0, gt=0, description="how long a collective waits for a rank before it fails")

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]

    @property
    def batch_sizes(self) -> BatchSizes:
        ramp = self.batch_ramp
        if ramp is None:
            return BatchSizes(self.global_batch_size)
        return BatchSizes(self.global_batch_size, ramp.start, ramp.increment, ramp.samples)

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        try:
            _ = self.batch_sizes
        except ValueError as error:
            raise ValueError(f"batch_ramp: {error}") from None
        return self


class OptimizerConfig(Section):
    """Weight decay acts on matrices, not on norms and biases."""

    name: Literal["adamw", "lamb"] = Field(
        "adamw", description="adamw (arXiv 1711.05101), or lamb (arXiv 1904.00962) for very large batches"
    )
    lr: float = Field(1e-4, gt=0.0, description="learning rate at the end of the warm-up")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="decay of the running mean of gradients, a step")
    beta2: float = Field(0.98, ge=0.0, lt=1.0, description="decay of the running mean of their squares, a step")
    eps: float = Field(1e-6, gt=0.0, description="added to the root of that mean")
    weight_decay: float = Field(0.01, ge=0.0, description="share of a weight taken off a step, times the learning rate")


class ScheduleConfig(Section):
    """The learning rate as a function of the step."""

    name: Literal["linear", "cosine", "wsd", "constant"] = Field(
        "linear",
        description="what follows the warm-up: a line or half a cosine down to minimum_ratio; wsd: the peak, then a "
        "line down over the last decay_steps; constant: the peak",
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise to optimizer.lr, counted in training.steps")
    minimum_ratio: float = Field(0.0, ge=0.0, le=1.0, description="last learning rate, as a share of optimizer.lr")
    decay_steps: int | None = Field(None, gt=0, description="length of the last phase; set with wsd, and only there")


class ParallelConfig(Section):
    """How the work is spread.  Ranks = tensor × pipeline × data."""

    tensor: int = Field(1, gt=0, description="ranks that share each layer")
    sequence: bool = Field(
        False, description="split activations between the tensor ranks' products by sequence (arXiv 2205.05198)"
    )
    pipeline: int = Field(1, gt=0, description="stages of consecutive layers (1F1B)")
    virtual_stages: int = Field(
        1, gt=0, description="chunks of layers a pipeline rank holds (interleaved 1F1B, arXiv 2104.04473); 1: 1F1B"
    )
    data: int | None = Field(None, gt=0, description="replicas; taken from the number of ranks where not set")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what DeepSpeed partitions over replicas: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights"
    )
    offload_optimizer: bool = Field(
        False, description="keep the optimizer's state and masters in host memory, updated there (DeepSpeed's CPU Adam)"
    )


class EvaluationConfig(Section):
    """Loss, perplexity and accuracy on the validation split, always the same rows and masks."""

    interval: int = Field(0, ge=0, description="steps between evaluations (and one at the end); 0: never")
    rows: int = Field(
        256, gt=0, description="rows of the validation split to use, from its start, over again if it is shorter"
    )


class CheckpointConfig(Section):
    """When the state is saved, and where weights may come from."""

    interval: int = Field(0, ge=0, description="steps between saves (and one at the end); 0: at the end only")
    asynchronous: bool = Field(
        True, description="training goes on while a copy of the state in host memory is written; false: it waits"
    )
    keep_last: int = Field(2, ge=0, description="how many of the newest to keep; 0: all")
    keep_every: int = Field(0, ge=0, description="those whose step divides by this are kept too; 0: none for that")
    keep_best: int = Field(0, ge=0, description="so many with the lowest validation loss at their step are kept too")
    initialize_from: str | None = Field(None, description="checkpoint whose weights a new run starts from")
    margin_seconds: float = Field(
        120.0, ge=0.0, description="so long before the job's time ends the run saves and stops, to be started again"
    )


class KernelsConfig(Section):
    """Which form the hot operations run in; a run may go on with another."""

    mode: Mode = Field(
        "auto",
        description="auto: compiled where that can be had, with a line where it cannot; require: or stop; reference: "
        "PyTorch; FARSPAN_KERNELS in the environment comes first",
    )
    cache: str | None = Field(
        None, description="folder of compiled kernels; null: FARSPAN_KERNEL_CACHE, or ~/.cache/farspan/kernels"
    )
    build_timeout_seconds: float = Field(
        600.0, gt=0, description="how long a compiler may take, and how long ranks wait for the one that builds"
    )


class SpikesConfig(Section):
    """Which steps are out of line, and what is done about them (docs/spikes.md)."""

    gradient_norm_factor: float = Field(
        4.0, ge=0.0, description="a gradient norm so many times the recent median is out of line; 0: none is"
    )
    loss_deviations: float = Field(
        8.0,
        ge=0.0,
        description="a loss so many robust standard deviations (1.4826 times the median absolute deviation) above the "
        "recent median is out of line; 0: none is",
    )
    window: int = Field(64, gt=1, description="steps that medians are taken over; nothing is out of line before")
    patience: int = Field(3, gt=0, description="so many steps out of line in a row are a spike; each of them is logged")
    action: Literal["log", "rollback"] = Field(
        "log",
        description="log: say it, and go on; rollback: go back to the last good checkpoint and leave out the data of "
        "the spike",
    )
    skip_before: int = Field(100, ge=0, description="steps before a spike whose data are left out too")
    skip_after: int = Field(100, ge=0, description="steps after its discovery whose data are left out too")
    max_rollbacks: int = Field(10, gt=0, description="rollbacks of the whole run, after which a spike ends it")

    def reach(self, max_skipped_steps: int) -> int:
        """How many steps a rollback may have to go back; 0 where there are none."""
        return self.skip_before + max(self.patience, max_skipped_steps) if self.action == "rollback" else 0

    @model_validator(mode="after")
    def _check(self) -> SpikesConfig:
        if self.patience > self.window // 2:
            raise ValueError(
                f"patience {self.patience} is more than half of window {self.window}, whose median would follow the "
                "spike: lower it, or raise window"
            )
        return self


class LoggingConfig(Section):
    """What is written while training."""

    interval: int = Field(10, gt=0, description="steps between console lines where there is no progress bar")
    tensorboard: bool = Field(True, description="write run_dir/tensorboard")


class HealthConfig(Section):
    """Ranks that hang, and ranks that are slow."""

    hang_seconds: float = Field(
        600.0,
        ge=0.0,
        description="a rank that gives no sign of life for so long while it trains or evaluates is reported in "
        "run_dir/hangs, and all are ended with exit code 76 (starting and saving: after training.timeout_seconds); "
        "0: no guard",
    )
    straggler_factor: float = Field(
        1.5,
        ge=0.0,
        description="a rank that is busy so many times as long as the others of its pipeline stage is named in the log "
        "and in TensorBoard; 0: none",
    )
    straggler_window: int = Field(32, gt=1, description="steps whose median is compared for that")

    @model_validator(mode="after")
    def _check(self) -> HealthConfig:
        if 0 < self.straggler_factor <= 1:
            raise ValueError(
                f"straggler_factor {self.straggler_factor:g} would name ranks that are no slower than others: "
                "set it above 1, or to 0 for none"
            )
        return self


def _parse_model(value: Any) -> Any:
    """The model section, as its architecture reads it."""
    if isinstance(value, ModelConfig):
        return value
    name = value.get("model_type") if isinstance(value, dict) else None
    if not isinstance(name, str):
        given = "missing" if name is None else f"{name!r}"
        raise ValueError(f"model_type is {given}: set it to one of {', '.join(sorted(ARCHITECTURES))}")
    return architecture(name).config_class.model_validate(value)


class Config(Section):
    """A whole run."""

    run_dir: str = Field(
        ..., min_length=1, description="folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/"
    )
    model: Annotated[SerializeAsAny[ModelConfig], BeforeValidator(_parse_model)]
    data: DataConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    kernels: KernelsConfig = KernelsConfig()
    spikes: SpikesConfig = SpikesConfig()
    logging: LoggingConfig = LoggingConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_model()
        self._check_layout()
        if self.checkpoint.keep_best and not self.evaluation.interval:
            raise ValueError(
                f"checkpoint.keep_best {self.checkpoint.keep_best} needs the validation loss of saved steps and "
                "evaluation.interval is 0: set it to a divisor of checkpoint.interval, or leave keep_best out"
            )
        if self.spikes.action == "rollback" and not self.checkpoint.interval:
            raise ValueError(
                "spikes.action rollback needs checkpoints to go back to and checkpoint.interval is 0: set it, or set "
                "action to log"
            )
        try:
            check_schedule(
                self.schedule.name,
                total_steps=self.training.steps,
                warmup_steps=self.schedule.warmup_steps,
                decay_steps=self.schedule.decay_steps,
            )
        except ValueError as error:
            raise ValueError(f"schedule: {error}") from None
        return self

    def _check_model(self) -> None:
        objective = OBJECTIVES[self.objective.name]
        if objective.causal != self.model.is_decoder:
            raise ValueError(
                f"objective.name {self.objective.name} needs model.is_decoder {str(objective.causal).lower()}, "
                f"it is {str(self.model.is_decoder).lower()}: set one to fit the other"
            )
        allowed = architecture(self.model.model_type).heads_allowed
        missing = [head for head in objective.heads if head not in allowed]
        if missing:
            raise ValueError(
                f"objective.name {self.objective.name} needs the {missing[0]} head, "
                f"which {self.model.model_type} does not have: set another objective or architecture"
            )
        if self.data.rows not in objective.row_modes:
            wanted = " or ".join(objective.row_modes)
            raise ValueError(
                f"objective.name {self.objective.name} needs data.rows {wanted}, it is {self.data.rows}: "
                "set one to fit the other"
            )
        if self.data.rows == "pairs" and self.model.type_vocab_size < 2:
            raise ValueError("data.rows pairs needs model.type_vocab_size of at least 2, it is 1: raise it")
        longest = self.model.longest_sequence
        if longest is not None and self.data.sequence_length > longest:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is longer than the model's positions "
                f"({longest}): lower it or raise model.{self.model.length_field}"
            )
        if self.model.needs_encoder:
            raise ValueError(
                "model.add_cross_attention needs the hidden states of an encoder, which no objective has: leave it out"
            )

    def _check_layout(self) -> None:
        parallel = self.parallel
        for field in self.model.split_over_tensor:
            value = getattr(self.model, field)
            if value % parallel.tensor:
                raise ValueError(
                    f"model.{field} {value} does not divide by parallel.tensor {parallel.tensor}: "
                    "set parallel.tensor to a divisor"
                )
        if parallel.sequence and parallel.tensor == 1:
            raise ValueError(
                "parallel.sequence splits over the tensor ranks and parallel.tensor is 1: raise it, or leave sequence "
                "out"
            )
        if parallel.sequence and self.data.sequence_length % parallel.tensor:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} does not divide by parallel.tensor "
                f"{parallel.tensor}, as parallel.sequence needs: set a multiple"
            )
        if parallel.virtual_stages > 1 and parallel.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_stages {parallel.virtual_stages} interleaves over pipeline ranks and "
                "parallel.pipeline is 1: raise it, or leave virtual_stages out"
            )
        stages = parallel.pipeline * parallel.virtual_stages
        if stages > self.model.num_hidden_layers:
            chunks = f" × virtual_stages {parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""
            raise ValueError(
                f"parallel.pipeline {parallel.pipeline}{chunks} exceeds model.num_hidden_layers "
                f"{self.model.num_hidden_layers}: set at most that, a stage needs a layer"
            )
        if parallel.zero_stage >= 2 and parallel.pipeline > 1:
            raise ValueError(
                f"parallel.zero_stage {parallel.zero_stage} does not go with parallel.pipeline {parallel.pipeline} "
                "(gradients of all microbatches are needed at once): set zero_stage to 0 or 1, or pipeline to 1"
            )
        if parallel.zero_stage == 3 and self.model.has_running_statistics:
            raise ValueError(
                "parallel.zero_stage 3 partitions weights, and a batch norm's running statistics are none that "
                "DeepSpeed knows: set zero_stage to at most 2, or model.normalization_type to another"
            )
        if parallel.offload_optimizer and parallel.zero_stage == 0:
            raise ValueError(
                "parallel.offload_optimizer is part of ZeRO and parallel.zero_stage is 0: set zero_stage to 1, 2 or 3"
            )
        if parallel.offload_optimizer and parallel.zero_stage == 2 and self.training.dtype != "float32":
            raise ValueError(
                "parallel.offload_optimizer with parallel.zero_stage 2 makes DeepSpeed add up the gradients of "
                f"microbatches in training.dtype {self.training.dtype}: set zero_stage to 1 or 3, or dtype to float32"
            )
        if parallel.offload_optimizer and self.optimizer.name != "adamw":
            raise ValueError(
                f"parallel.offload_optimizer updates with DeepSpeed's CPU Adam, optimizer.name is "
                f"{self.optimizer.name}: set adamw, or leave offload_optimizer out"
            )
        if parallel.data is not None:
            self.check_batches(parallel.data)

    def check_batches(self, data: int) -> None:
        """ValueError where a step's rows, or the evaluation's, cannot be spread over so many data ranks."""
        training, ramp = self.training, "training.batch_ramp's size"
        for size in training.batch_sizes.sizes:
            what = "training.global_batch_size" if size == training.global_batch_size else ramp
            self._check_rows(what, size, data)
            if self.model.mixes_rows:
                self._check_equal_microbatches(what, size, data)
        if self.evaluation.interval:
            self._check_rows("evaluation.rows", self.evaluation.rows, data)

    def _check_rows(self, what: str, rows: int, data: int) -> None:
        parallel = self.parallel
        if rows < data:
            raise ValueError(
                f"{what} {rows} leaves some of {data} data ranks without a row: set at least {data}, "
                "or parallel.data to fewer"
            )
        if parallel.virtual_stages > 1 and rows < data * parallel.pipeline:
            raise ValueError(
                f"{what} {rows} leaves {rows // data} to some of {data} data ranks, and the interleaved schedule needs "
                f"parallel.pipeline {parallel.pipeline} microbatches on each: set at least {data * parallel.pipeline}"
            )

    def _check_equal_microbatches(self, what: str, rows: int, data: int) -> None:
        micro = self.training.micro_batch_size
        whole = micro * data * (self.parallel.pipeline if self.parallel.virtual_stages > 1 else 1)
        if rows % whole:
            raise ValueError(
                f"{what} {rows} does not make equal microbatches of training.micro_batch_size {micro} on {data} data "
                "ranks, as a model needs whose rows depend on the others of their microbatch: "
                f"set a multiple of {whole}"
            )

    @property
    def batch_sizes(self) -> BatchSizes:
        """Which samples a step holds."""
        return dataclasses.replace(self.training.batch_sizes, skips=self.data.skips)

    @property
    def rollback_reach(self) -> int:
        """How many steps a rollback may have to go back; 0 where there are none."""
        return self.spikes.reach(self.training.max_skipped_steps)

    def with_skips(self, skips: Iterable[Skip]) -> Config:
        """The configuration with these in place of its own."""
        data = self.data.model_copy(update={"skip": tuple(SkipConfig(**skip._asdict()) for skip in skips)})
        return self.model_copy(update={"data": data})

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(OBJECTIVES[self.objective.name].heads)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)

    def with_vocabulary(self, size: int, pad: int, bos: int, eos: int) -> Config:
        """The configuration with the tokenizer's sizes filled in; ValueError where the file says otherwise."""
        said = self.model.model_fields_set
        fields = self.model.model_dump()
        if self.model.vocab_size and self.model.vocab_size < size:
            raise ValueError(
                f"model.vocab_size {self.model.vocab_size} is smaller than the tokenizer's {size} "
                f"in {self.data.folder}: leave it out, or prepare the data with another tokenizer"
            )
        if "pad_token_id" in said and self.model.pad_token_id != pad:
            raise ValueError(
                f"model.pad_token_id {self.model.pad_token_id} is not the tokenizer's ({pad}) in {self.data.folder}: "
                "leave it out, or prepare the data with another tokenizer"
            )
        fields |= {"vocab_size": self.model.vocab_size or size, "pad_token_id": pad}
        fields |= {name: value for name, value in (("bos_token_id", bos), ("eos_token_id", eos)) if name not in said}
        return Config.model_validate({**self.model_dump(), "model": fields})


def check_world(config: Config, world_size: int, device: torch.device) -> int:
    """The number of data ranks; ValueError where the ranks, the batch or the dtype do not fit."""
    parallel = config.parallel
    model = parallel.tensor * parallel.pipeline
    if world_size % model or parallel.data not in (None, world_size // model):
        wanted = f"{model * parallel.data}" if parallel.data is not None else f"a multiple of {model}"
        replicas = f" × data {parallel.data}" if parallel.data is not None else ""
        raise ValueError(
            f"{world_size} ranks do not make parallel.tensor {parallel.tensor} × pipeline {parallel.pipeline}"
            f"{replicas}: start {wanted} ranks, or change the parallel section"
        )
    # torch's own question counts emulation, and asks the current device: not this rank's yet.
    bfloat16 = config.training.dtype == "bfloat16" and device.type == "cuda"
    if bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"training.dtype bfloat16 is not supported by {torch.cuda.get_device_name(device)}: set float32"
        )
    data = world_size // model
    config.check_batches(data)
    return data
