"""From TensorFlow: checkpoints with the variables of the original BERT code (github.com/google-research/bert, and what
grew from it) as Megatron-BERT.

**Who reads the files.**  TensorFlow, which also checks their checksums.  It is an extra (``pip install
'farspan[tensorflow]'``): of readers without it there is one on PyPI, which ended in 2023 and needs protobuf below 3.19.
It runs in a process of its own (tensorflow_reader.py), for over some damaged files it aborts, and it takes 600 MB; and
by any interpreter (``python``), for where it is installed TensorBoard loads it into every process that logs.

**What is exact.**  A Megatron-BERT, norms before the branches: ``attention/ln`` and ``ln`` in the layers, ``ln`` after
them.  Kernels are transposed, queries, keys and values stacked, and nothing is computed.

**What is not.**  Original BERT has the same weights, but normalises embeddings and what every branch gives (arXiv
1810.04805; 2002.04745, figure 1a), which Megatron-BERT never does: no placing of the norms gives its logits.
``warm_start`` puts each norm where what it gave was read: that of the embeddings before the first layer's attention,
that of attention before the feed-forward, that of the feed-forward before the next layer's attention, or last.  Then
branches see inputs of the scale that they were trained on, but the sums between are no longer normalised: it is a
start for further pretraining, nothing to use as it is.  Two small BERTs (4 layers of 96 and 64 features, trained for
1200 and 1468 steps, not much below the entropy of single tokens) began at 5.58 and 3.26 nats a masked token where they
had ended at 5.39 and 3.22; random weights begin at 7.34 and 3.90.  What it is worth for a large one was not measured.

**Activation.**  ``gelu`` is taken as the exact one (erf), as transformers takes it and BERT's first release computed
it; its code of February 2019 and after computes the tanh approximation, ``gelu_new``: give ``hidden_act`` for a model
that was trained with that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_mapping, write_json
from ..models.huggingface_keys import HuggingFaceKeys, sources, tensor_names
from ..models.megatron_bert import MegatronBert, MegatronBertConfig
from .imported import TOKENIZER_FILES, Imported, logical_shapes
from .model import parse_config
from .renaming import logical_tensors, rename

# What an optimizer keeps: BERT's own, and that of TensorFlow.  A variable is one if a part of its name is.
_OPTIMIZER = {
    "adam_m", "adam_v", "AdamWeightDecayOptimizer", "AdamWeightDecayOptimizer_1", "global_step",
    "Adam", "Adam_1", "beta1_power", "beta2_power",
}  # fmt: skip
_POOLER = {"bert/pooler/dense/kernel", "bert/pooler/dense/bias"}  # read by the sentence head alone
_LAYER = re.compile(r"bert/encoder/layer_(\d+)/.+")
_REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_START = (
    "its norms stood after the branches and now stand before them: a warm start for further pretraining, whose logits "
    "are not those of the source"
)


@dataclasses.dataclass(frozen=True)
class Variable:
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a checkpoint becomes: ``names`` says which variable each Hugging Face tensor is."""

    config: MegatronBertConfig
    heads: tuple[str, ...]
    names: Mapping[str, str]
    post_norm: bool

    @property
    def keys(self) -> HuggingFaceKeys:
        return MegatronBert.huggingface_keys(self.config, self.heads)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return logical_shapes(MegatronBert, self.config, self.heads)


def read_model(
    path: Path,
    *,
    warm_start: bool = False,
    config: Path | None = None,
    hidden_act: str | None = None,
    lower_case: bool | None = None,
    python: Path | None = None,
) -> Imported:
    """A TensorFlow checkpoint as a Megatron-BERT.

    Args:
        path: its folder, or its prefix there (``bert_model.ckpt``), or its ``.index`` file.
        warm_start: take an original BERT, as the module's docstring says.
        config: its bert_config.json, by default the one beside it.
        hidden_act: in place of what bert_config.json says.
        lower_case: what its tokenizer does, where there is only a vocab.txt; by default whether the vocabulary has no
            word with a capital.
        python: an interpreter that has TensorFlow, by default this one.

    Raises:
        ValueError: a file is missing or damaged, TensorFlow is missing, or the variables are not those of such a model
            (also from ``Imported.read``, for a damaged one).
    """
    prefix = find_prefix(path)
    config_file = prefix.parent / "bert_config.json" if config is None else config
    vocabulary = _vocabulary(prefix.parent / "vocab.txt")
    model = read_config(config_file, vocabulary, hidden_act)
    checkpoint = Checkpoint(prefix, Path(sys.executable) if python is None else python)
    plan = make_plan(checkpoint.variables, model, prefix, config_file, warm_start=warm_start)
    source = _Source(checkpoint, plan, _cased(vocabulary, lower_case))
    return Imported(
        cls=MegatronBert,
        config=plan.config,
        heads=plan.heads,
        read=source.read,
        dtypes=logical_dtypes(checkpoint.variables, plan, prefix),
        tokenizer=source.tokenizer(),
        note=WARM_START if plan.post_norm else None,
    )


def find_prefix(path: Path) -> Path:
    """The prefix of the files of a checkpoint: absolute, so that TensorFlow takes it for nothing but a path."""
    path = path.absolute()
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            reason = f"has {len(found)} checkpoints: give one of them, such as {found[-1]}" if found else (
                "has no TensorFlow checkpoint, a .index file with .data files beside it: give the folder of one"
            )  # fmt: skip
            raise ValueError(f"{path} {reason}")
        path = found[0]
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    index = prefix.with_name(prefix.name + ".index")
    if not index.is_file():
        raise ValueError(f"{index} is missing: give the folder of a TensorFlow checkpoint, or its files' common prefix")
    if not any(file.name.startswith(f"{prefix.name}.data-") for file in prefix.parent.iterdir()):
        raise ValueError(f"{prefix}.data-00000-of-00001 is missing: copy it beside {index.name}")
    return prefix


def read_config(file: Path, vocabulary: Sequence[str] = (), hidden_act: str | None = None) -> MegatronBertConfig:
    """What a bert_config.json says of a model; ``vocabulary``: of its tokenizer, if there is one."""
    fields = read_mapping(file, "a folder of a TensorFlow BERT")
    if missing := [name for name in _REQUIRED if name not in fields]:
        raise ValueError(f"{file} lacks {', '.join(missing)}: give the bert_config.json that belongs to the weights")
    if "[PAD]" in vocabulary:
        fields.setdefault("pad_token_id", vocabulary.index("[PAD]"))
    if hidden_act is not None:
        fields["hidden_act"] = hidden_act
    known = {name: fields[name] for name in MegatronBertConfig.model_fields if name in fields}
    config = parse_config(MegatronBert, known | {"model_type": MegatronBert.name}, file)
    assert isinstance(config, MegatronBertConfig)
    if len(vocabulary) > config.vocab_size:
        raise ValueError(
            f"{file} has a vocab_size of {config.vocab_size}, the vocab.txt of the checkpoint {len(vocabulary)} "
            "tokens: give those that belong to the weights"
        )
    return config


def make_plan(
    variables: Mapping[str, Variable], config: MegatronBertConfig, prefix: Path, config_file: Path, *, warm_start: bool
) -> Plan:
    """What becomes of a checkpoint with these variables."""
    names = {name for name in variables if not _OPTIMIZER & set(name.split("/"))}
    post_norm = _is_post_norm(names, prefix)
    if post_norm and not warm_start:
        raise ValueError(
            f"{prefix} is an original BERT, its norms after the branches: a Megatron-BERT has them before, and other "
            "logits with the same weights; set warm_start (--warm-start) to take it as a start for further pretraining"
        )
    if warm_start and not post_norm:
        raise ValueError(f"{prefix} is a Megatron-BERT, and converts exactly: leave warm_start (--warm-start) out")
    layers = len({match[1] for name in names if (match := _LAYER.fullmatch(name))})
    if layers != config.num_hidden_layers:
        raise ValueError(
            f"{prefix} has {layers} layers, {config_file} a num_hidden_layers of {config.num_hidden_layers}: give the "
            "one that belongs to the weights"
        )
    plan = _with_heads(names, config, post_norm, prefix)
    _check_shapes(variables, plan, prefix, config_file)
    return plan


def _is_post_norm(names: set[str], prefix: Path) -> bool:
    if {"bert/embeddings/LayerNorm/gamma", "bert/encoder/ln/gamma"} <= names:
        raise ValueError(f"{prefix} has norms of original BERT and of Megatron-BERT: it is neither")
    if "bert/embeddings/LayerNorm/gamma" in names or "bert/encoder/ln/gamma" in names:
        return "bert/embeddings/LayerNorm/gamma" in names
    first = min(names, default="none at all")
    kind = "an object-based checkpoint of TensorFlow 2" if any("/.ATTRIBUTES/" in name for name in names) else "no BERT"
    raise ValueError(
        f"{prefix} is {kind} (its variables: {first}, …): give one with the names of the original BERT code, "
        "bert/encoder/layer_0/…"
    )


def _with_heads(names: set[str], config: MegatronBertConfig, post_norm: bool, prefix: Path) -> Plan:
    """The plan with all heads that there are variables for; every other variable must be accounted for."""
    closest: set[str] | None = None  # what is missing, by the heads of which the least is
    for heads in (("lm", "nsp"), ("lm",), ("nsp",), ()):
        keys = tensor_names(MegatronBert.huggingface_keys(config, heads))
        wanted = {key: variable_name(key, config.num_hidden_layers if post_norm else None) for key in keys}
        missing = set(wanted.values()) - names
        if not missing:
            if unknown := sorted(names - set(wanted.values()) - _POOLER):
                raise ValueError(
                    f"{prefix} has {len(unknown)} variables that a BERT of its bert_config.json does not account for, "
                    f"such as {unknown[0]}: importing would drop them"
                )
            return Plan(config, heads, wanted, post_norm)
        if closest is None or len(missing) < len(closest):
            closest = missing
    shown = ", ".join(sorted(closest or ())[:3])
    raise ValueError(f"{prefix} lacks variables of a BERT of its bert_config.json, such as {shown}")


def variable_name(key: str, post_norm_layers: int | None = None) -> str:
    """The variable that a Hugging Face tensor of a Megatron-BERT is; ``post_norm_layers``: in an original BERT of so
    many layers."""
    path, kind = key.removeprefix("bert.").rsplit(".", 1)
    path = re.sub(r"\blayer\.(\d+)\b", r"layer_\1", path).replace(".", "/")
    path = path if path.startswith("cls/") else f"bert/{path}"
    if path.endswith("_embeddings"):
        return path
    if path.endswith(("/ln", "/LayerNorm")):
        path = path if post_norm_layers is None else _post_norm(path, post_norm_layers)
        return f"{path}/{'gamma' if kind == 'weight' else 'beta'}"
    if path == "cls/seq_relationship" or key == "cls.predictions.bias":
        return f"{path}/output_{'weights' if kind == 'weight' else 'bias'}"
    return f"{path}/{'kernel' if kind == 'weight' else 'bias'}"


def _post_norm(path: str, layers: int) -> str:
    """The norm of an original BERT whose output a norm of a Megatron-BERT takes the place of."""
    match = re.fullmatch(r"bert/encoder(?:/layer_(\d+)/(attention/)?ln|/ln)", path)
    if match is None:  # the head's, which both have
        return path
    if match[1] is not None and match[2] is None:
        return f"bert/encoder/layer_{match[1]}/attention/output/LayerNorm"
    before = (layers if match[1] is None else int(match[1])) - 1
    return f"bert/encoder/layer_{before}/output/LayerNorm" if before >= 0 else "bert/embeddings/LayerNorm"


def _check_shapes(variables: Mapping[str, Variable], plan: Plan, prefix: Path, config_file: Path) -> None:
    logical = {name: torch.empty(shape, device="meta") for name, shape in plan.shapes.items()}
    for key, tensor in rename(logical, plan.keys).items():
        name = plan.names[key]
        variable, shape = variables[name], _turned(name, tensor).shape
        if variable.shape != tuple(shape):
            raise ValueError(
                f"{name} in {prefix} has shape {variable.shape}, {config_file} makes it {tuple(shape)}: give the "
                "bert_config.json that belongs to the weights"
            )
        if variable.dtype not in _DTYPES:
            raise ValueError(f"{name} in {prefix} is of type {variable.dtype}: one of {', '.join(_DTYPES)} is needed")


def logical_dtypes(variables: Mapping[str, Variable], plan: Plan, prefix: Path) -> dict[str, torch.dtype]:
    """Of every logical tensor."""
    found = {}
    for name, of_one in plan.keys.items():
        kinds = {variables[plan.names[source.tensor]].dtype for source in sources(of_one)}
        if len(kinds) > 1:
            of = ", ".join(plan.names[source.tensor] for source in sources(of_one))
            raise ValueError(f"{of} in {prefix} are of {len(kinds)} types: give a checkpoint with these of one")
        found[name] = _DTYPES[kinds.pop()]
    return found


def _turned(name: str, tensor: Tensor) -> Tensor:
    """TensorFlow multiplies kernels from the right, PyTorch from the left."""
    return tensor.t() if name.endswith("/kernel") else tensor


class Checkpoint:
    """The variables of a TensorFlow checkpoint, which a process with TensorFlow reads one at a time.

    The process ends with this object, and with this process.
    """

    def __init__(self, prefix: Path, python: Path) -> None:
        self.prefix, self.python, self._started = prefix, python, False
        command = [str(python), str(Path(__file__).with_name("tensorflow_reader.py")), str(prefix)]
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, env=os.environ | quiet)
        except OSError as error:
            raise ValueError(f"{python} does not run ({error.strerror}): give an interpreter with TensorFlow") from None
        weakref.finalize(self, _end, self._process)
        self._reply()  # its version
        self._started = True
        described = self._reply()["variables"]
        if odd := [name for name in described if not name.isprintable() or len(name) > 200]:
            raise ValueError(f"{prefix} has a variable named {odd[0][:50]!r}…: it is damaged, copy it again")
        self.variables = {name: Variable(dtype, tuple(shape)) for name, (dtype, shape) in described.items()}

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            reply = json.loads(self._process.stdout.readline())
        except json.JSONDecodeError:
            reply = {"error": "it ended the process that read it"}
        if "error" not in reply:
            return reply
        reason = " ".join(str(reply["error"]).split())[:300]
        if self._started:
            raise ValueError(f"{self.prefix} cannot be read by TensorFlow ({reason}): it is damaged, copy it again")
        if reply.get("missing"):
            raise ValueError(
                f"TensorFlow, which reads {self.prefix}, is not installed for {self.python}: pip install "
                "'farspan[tensorflow]', or give an interpreter that has it (--python)"
            )
        raise ValueError(f"TensorFlow does not start in {self.python}: see {self.python} -c 'import tensorflow'")

    def read(self, name: str) -> Tensor:
        """One variable, in its dtype and shape."""
        assert self._process.stdin is not None and self._process.stdout is not None
        variable = self.variables[name]
        with contextlib.suppress(BrokenPipeError):  # a process that has ended gives no reply either
            self._process.stdin.write(json.dumps(name).encode() + b"\n")
            self._process.stdin.flush()
        size = self._reply()["bytes"]
        tensor = torch.empty(variable.shape, dtype=_DTYPES[variable.dtype])
        room = tensor.view(-1).view(torch.uint8).numpy().data
        if size != len(room):
            raise ValueError(f"{name} in {self.prefix} has {size} bytes, not {len(room)}: it is damaged, copy it again")
        while room:
            if not (count := self._process.stdout.readinto(room)):  # type: ignore[attr-defined]
                raise ValueError(f"TensorFlow ended while it read {name} of {self.prefix}: start again")
            room = room[count:]
        return tensor


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # it has nothing to lose
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class _Source:
    """What ``Imported.read`` reads, and a folder for the tokenizer that lasts as long."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, lower_case: bool | None) -> None:
        """``lower_case``: of the tokenizer; None: there is none."""
        self._checkpoint, self._plan, self._lower_case = checkpoint, plan, lower_case
        self._keys, self._shapes = plan.keys, plan.shapes
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def read(self, name: str) -> Tensor:
        return logical_tensors(self._tensor, {name: self._keys[name]}, self._shapes)[name]

    def _tensor(self, key: str) -> Tensor:
        name = self._plan.names[key]
        return _turned(name, self._checkpoint.read(name)).contiguous()

    def tokenizer(self) -> Path | None:
        """A folder with its files: the checkpoint's own, or one that says of its vocab.txt what is to be known."""
        folder = self._checkpoint.prefix.parent
        if any((folder / name).is_file() for name in TOKENIZER_FILES if name != "vocab.txt"):
            return folder
        if self._lower_case is None:
            return None
        self._folder = tempfile.TemporaryDirectory(prefix="farspan-tokenizer-")
        shutil.copyfile(folder / "vocab.txt", Path(self._folder.name) / "vocab.txt")
        write_json(
            Path(self._folder.name) / "tokenizer_config.json",
            {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": self._lower_case,
                "model_max_length": self._plan.config.max_position_embeddings,
            },
        )
        return Path(self._folder.name)


def _vocabulary(path: Path) -> list[str]:
    try:
        # Tokens may be what Unicode calls the end of a line.
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.is_file() else []
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged (not UTF-8): put a whole one there") from None


def _cased(vocabulary: list[str], lower_case: bool | None) -> bool | None:
    """Whether text is folded before it is looked up; special tokens, in brackets, say nothing about that."""
    if lower_case is not None or not vocabulary:
        return lower_case if vocabulary else None
    return not any(token != token.lower() for token in vocabulary if not token.startswith("["))
