"""What a configuration asks of the machine: its data, its layout, its memory."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch

from ...pretrain.config import Config, check_world
from ...pretrain.data.store import MANIFEST, read_manifest
from ...pretrain.files import explain
from ...pretrain.run import objective_of, with_tokenizer
from ..tables import size
from . import sizes
from .report import Section


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Of the run that the configuration is for: in all, and on this node."""

    world: int
    local: int


def look_at_data(section: Section, config: Config, *, quick: bool) -> Config:
    """The configuration with its tokenizer's vocabulary, where that can be had."""
    folder = Path(config.data.folder)
    try:
        resolved, vocabulary = with_tokenizer(config)
        manifest = read_manifest(folder)
        splits = ["train"] + (["validation"] if config.evaluation.interval else [])
        section.facts |= {"folder": str(folder), "vocabulary": vocabulary.size, "splits": {}}
        section.facts["digest"] = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:8]
        for split in splits:
            described = manifest["splits"].get(split)
            if described is None:
                raise ValueError(f"{folder} has no split {split!r}: prepare it with one, or set evaluation.interval 0")
            _shards_are_there(folder, described["shards"], int(manifest["dtype"][-1]))
            section.facts["splits"][split] = {name: described[name] for name in ("documents", "tokens")}
            said = f"{folder}, {split}: {described['documents']:,} documents, {described['tokens']:,} tokens"
            if not quick:
                objective = objective_of(resolved, vocabulary, split)
                objective.batch(torch.arange(1).numpy())
                rows = objective.rows.rows_per_epoch
                section.facts["splits"][split]["rows"] = rows
                said += f", {rows:,} rows of {config.data.sequence_length}"
            section.say(said)
        section.say(f"its tokenizer has {vocabulary.size:,} tokens")
        if not quick:
            _epochs(section, config)
        return resolved
    except (ValueError, OSError) as error:
        said = explain(error) if isinstance(error, OSError) else str(error)
        section.say(f"{folder}: not usable")
        section.fault(said, "a run ends at its start", "see the end of that line")
        return config


def _shards_are_there(folder: Path, shards: list[dict[str, object]], itemsize: int) -> None:
    """Their sizes alone: every rank maps all of them, so they have to be seen from every node."""
    for shard in shards:
        path, expected = folder / str(shard["file"]), int(str(shard["tokens"])) * itemsize
        found = path.stat().st_size
        if found != expected:
            raise ValueError(f"shard {path} has {found} bytes, dataset.json says {expected}: prepare the data again")
        with path.open("rb") as file:
            file.read(1)  # a right to list is not one to read


def _epochs(section: Section, config: Config) -> None:
    rows, training = section.facts["splits"]["train"]["rows"], config.training
    used = training.batch_sizes.samples_of(training.steps - 1)[-1] + 1
    section.facts["epochs"] = used / rows
    section.say(f"the run's {training.steps:,} steps see {used:,} rows: {used / rows:.2g} epochs")


def look_at_layout(section: Section, config: Config, ranks: Ranks, *, memory: int, gpus: int) -> None:
    """``memory``: bytes that all processes of this node may have, of the host; of GPUs their own is asked."""
    parallel = config.parallel
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    section.facts |= {"ranks": ranks.world, "local_ranks": ranks.local}
    try:
        data = check_world(config, ranks.world, device)
    except ValueError as error:
        section.fault(str(error), "a run ends at its start", "see the end of that line")
        section.say(f"{ranks.world} ranks do not make this layout")
        data = max(1, parallel.data or ranks.world // (parallel.tensor * parallel.pipeline))
    section.say(
        f"{ranks.world} ranks ({ranks.local} on a node): tensor {parallel.tensor} × pipeline {parallel.pipeline} × "
        f"data {data}, ZeRO {parallel.zero_stage}, {config.training.dtype}"
    )
    if gpus and ranks.local > gpus:
        section.fault(
            f"{ranks.local} ranks are to run on this node and it shows {gpus} GPUs",
            "each rank needs a GPU of its own",
            f"start {gpus} ranks a node, or more nodes",
        )
    if not config.model.vocab_size:
        section.say("without the vocabulary nothing is known of sizes: data.folder cannot be used")
        return
    count, needed = sizes.parameters(config), sizes.rank_bytes(config, data)
    checkpoint = sizes.checkpoint_bytes(config)
    section.facts |= {
        "parameters": count, "data_ranks": data, "rank_bytes": dataclasses.asdict(needed),
        "checkpoint_bytes": checkpoint,
    }  # fmt: skip
    section.say(f"{count:,} parameters; a checkpoint has {size(checkpoint)}")
    parts = [f"weights {size(needed.weights)}", f"gradients {size(needed.gradients)}"]
    parts += [f"optimizer {size(needed.optimizer or needed.offloaded)}" + " in host memory" * bool(needed.offloaded)]
    parts += [f"activations about {size(needed.activations)}"]
    section.say(f"a rank takes {', '.join(parts)}")
    if gpus:
        total = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
        _fits(section, needed.state, needed.total, total, "a GPU")
        host = needed.offloaded * ranks.local
    else:
        host = (needed.total + needed.offloaded) * ranks.local
    if memory:
        state = host if gpus else (needed.state + needed.offloaded) * ranks.local
        _fits(section, state, host, memory, f"this node, for {ranks.local} ranks,")


def _fits(section: Section, state: int, total: int, memory: int, what: str) -> None:
    mend = (
        "raise parallel.tensor, pipeline or zero_stage, set parallel.offload_optimizer, or take a dtype of 16 bits"
        if state > memory
        else "lower training.micro_batch_size, or set training.recompute: selective or full"
    )
    if state > memory:
        section.fault(
            f"{what} has {size(memory)}, and weights, gradients and optimizer state alone take {size(state)}",
            "the run ends when its optimizer is made",
            mend,
        )
    elif total > memory:
        section.warn(
            f"{what} has {size(memory)}, and a step takes about {size(total)}",
            "activations are estimated roughly; the first step may run out of memory",
            mend,
        )
