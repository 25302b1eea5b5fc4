"""The model card of an export: what is known of the model, and nothing else.

README.md with the metadata of Hugging Face's model cards (https://huggingface.co/docs/hub/model-cards) in front.  A
license is none of the things that a checkpoint knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .. import checkpoint as ckpt
from ..config import Config
from ..data.store import MANIFEST as DATA_MANIFEST
from ..data.store import read_manifest
from ..models.config import ModelConfig

# Fields of a configuration that are sizes, in the order of the card.
_SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "nffn_hidden_size",
    "shared_representation_size", "ema_projection_size", "vocab_size", "type_vocab_size", "chunk_size",
    "approx_mode", "block_per_row", "num_landmarks", "conv_kernel_size",
)  # fmt: skip
_OBJECTIVES = {
    "mlm": "masked language modelling",
    "clm": "causal language modelling",
    "mlm+nsp": "masked language modelling and next-sentence prediction",
    "mlm+sop": "masked language modelling and sentence-order prediction",
}
_SECTIONS = ("objective", "training", "optimizer", "schedule")


def model_card(
    manifest: ckpt.Manifest,
    config: ModelConfig,
    fields: Mapping[str, Any],
    parameters: int,
    *,
    heads: tuple[str, ...],
    tokenizer: bool,
    own_code: bool,
    note: str | None,
) -> str:
    """README.md of an export.

    ``fields``: its config.json.  ``parameters``: of the model, each counted once.  ``tokenizer``: whether there is one
    in the folder.  ``own_code``: whether modelling files are.  ``note``: what to know when loading it.
    """
    run = _run(manifest)
    parts = [
        _metadata(config, heads),
        f"# {config.model_type}, {_short(parameters)} parameters",
        _origin(manifest, run),
        "## Use",
        _use(config, fields, heads, tokenizer=tokenizer, own_code=own_code),
        *([f"Note: {note}."] if note else []),
        "## Model",
        _table(_model(config, fields, parameters)),
    ]
    if run is not None:
        parts += ["## Training", _table(_training(manifest, run)), _settings(manifest)]
    if manifest.metrics:
        parts += ["## Metrics", f"At step {manifest.step}, in nats:", _table(_metrics(manifest))]
    return "\n\n".join(parts) + "\n"


def _metadata(config: ModelConfig, heads: tuple[str, ...]) -> str:
    values: dict[str, Any] = {"library_name": "transformers"}
    if "lm" in heads:
        values["pipeline_tag"] = "text-generation" if config.is_decoder else "fill-mask"
    values["tags"] = ["farspan", config.model_type]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _run(manifest: ckpt.Manifest) -> Config | None:
    """The configuration of the run; None where there was none, or another Farspan's that this one cannot read."""
    try:
        return Config.model_validate(manifest.config) if manifest.config else None
    except ValidationError:
        return None


def _origin(manifest: ckpt.Manifest, run: Config | None) -> str:
    by = manifest.written_by
    farspan = f"Farspan {by.get('version', 'unknown')} (commit {by.get('commit', 'unknown')})"
    if not manifest.step:
        where = "a Hugging Face folder" if manifest.huggingface else "elsewhere"
        return f"Taken over from {where} by {farspan}, and not trained since."
    of, weights = "", ""
    if run is not None:
        of = f" of {run.training.steps}"
        if start := run.checkpoint.initialize_from:
            weights = f", starting from the weights of `{Path(start).name}`"
    return f"Pretrained with {farspan}, up to step {manifest.step}{of}{weights}."


def _use(
    config: ModelConfig, fields: Mapping[str, Any], heads: tuple[str, ...], *, tokenizer: bool, own_code: bool
) -> str:
    trust = ", trust_remote_code=True" if own_code else ""
    if tokenizer and heads == ("lm",):
        task = "text-generation" if config.is_decoder else "fill-mask"
        text = '"Once upon a time"' if config.is_decoder else 'f"Once upon a {model.tokenizer.mask_token}."'
        lines = [
            "from transformers import pipeline",
            "",
            f'model = pipeline("{task}", model="PATH"{trust})',
            f"print(model({text}))",
        ]
    else:
        name = auto_class(config, heads)
        lines = [
            f"from transformers import {name}" + (", AutoTokenizer" if tokenizer else ""),
            "",
            *(['tokenizer = AutoTokenizer.from_pretrained("PATH")'] if tokenizer else []),
            f'model = {name}.from_pretrained("PATH"{trust})',
            *(['print(model(**tokenizer("Once upon a time.", return_tensors="pt")))'] if tokenizer else []),
        ]
    code = "\n".join(["```python", *lines, "```"])
    said = "The folder brings its own modelling files, which `trust_remote_code=True` allows to be run." * own_code
    return "\n\n".join([code, *([said] if said else [])])


def auto_class(config: ModelConfig, heads: tuple[str, ...]) -> str:
    """The Auto class of transformers that loads all heads of an export."""
    if "nsp" in heads:
        return "AutoModelForPreTraining" if "lm" in heads else "AutoModelForNextSentencePrediction"
    if not heads:
        return "AutoModel"
    return "AutoModelForCausalLM" if config.is_decoder else "AutoModelForMaskedLM"


def _model(config: ModelConfig, fields: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    values: dict[str, Any] = {"class": ", ".join(map(str, fields.get("architectures") or [])), "parameters": parameters}
    for name in _SIZES:
        if (value := getattr(config, name, None)) is not None and value != -1:
            values[name] = value
    longest = config.longest_sequence
    values["longest sequence"] = "any" if longest is None else longest
    values["weights"] = fields["torch_dtype"]
    return values


def _training(manifest: ckpt.Manifest, run: Config) -> dict[str, Any]:
    rows = run.training.batch_sizes.samples_of(manifest.step - 1).stop if manifest.step else 0
    length = run.data.sequence_length
    values: dict[str, Any] = {"objective": _OBJECTIVES.get(run.objective.name, run.objective.name)}
    values |= {"data": f"`{Path(run.data.folder).name}`", **_data(manifest, run)}
    values["rows"] = f"{run.data.rows}, {length} tokens" if run.data.rows == "packed" else (
        f"{run.data.rows}, at most {length} tokens"
    )  # fmt: skip
    values["updates"] = manifest.step
    values["rows seen"] = rows
    if run.data.rows == "packed":  # each is full
        values["tokens seen"] = rows * length
    layout = {name.replace("_", " "): size for name, size in manifest.layout.items() if size > 1}
    if layout:
        values["layout"] = ", ".join(f"{name} {size}" for name, size in layout.items())
    return values


def _data(manifest: ckpt.Manifest, run: Config) -> dict[str, Any]:
    """What the prepared data says of itself, where it still lies there as it was."""
    path = Path(run.data.folder) / DATA_MANIFEST
    try:
        content, said = path.read_bytes(), read_manifest(path.parent)
    except (OSError, ValueError):
        return {}
    if hashlib.sha256(content).hexdigest() != manifest.trainer.get("data"):
        return {}
    names = [Path(str(source["path"])).name for source in said.get("settings", {}).get("inputs", [])]
    train = said["splits"].get("train", {})
    values = {"source": ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")}
    values |= {f"{what} to train on": train.get(what) for what in ("documents", "tokens")}
    return {name: value for name, value in values.items() if value}


def _settings(manifest: ckpt.Manifest) -> str:
    sections = {name: manifest.config[name] for name in _SECTIONS if name in manifest.config}
    return f"```yaml\n{yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)}```"


def _metrics(manifest: ckpt.Manifest) -> dict[str, Any]:
    names = {"loss": "loss of the step", "validation_loss": "validation loss"}
    return {names.get(name, name): f"{value:.4f}" for name, value in manifest.metrics.items()}


def _table(values: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value} |"
        for name, value in values.items()
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


def _short(parameters: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)
