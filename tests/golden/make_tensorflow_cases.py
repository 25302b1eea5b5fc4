"""Make the TensorFlow checkpoints beside this file, with TensorFlow and the model classes of transformers.

    python tests/golden/make_tensorflow_cases.py

writes the folders `tensorflow-*`. Each is what a release of BERT has (bert_config.json, vocab.txt, bert_model.ckpt.*),
and beside it the same model under transformers' names in reference.safetensors, and what that makes of
inputs.safetensors (outputs.safetensors; float32, dropout off). All parameters carry random noise, so that no two can be
swapped unseen.

It needs torch, safetensors, transformers 4.37.2, which still reads such checkpoints, and TensorFlow (2.21 made those
that are kept). Every case is a pure function of its name and of the versions in its case.json, and is written only if
transformers' own reader makes of the checkpoint the model that it was written from, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import string
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import load_tf_weights_in_bert
from transformers.models.megatron_bert.modeling_megatron_bert import load_tf_weights_in_megatron_bert

# Float32 must be this near to the same model in float64, relative to each tensor's largest value.
LARGEST_ERROR = 3.5e-6
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
# What bert_config.json of the original releases says (the last, of some, is said of the pooler and read by nothing).
FIELDS = (
    "attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size", "initializer_range",
    "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "type_vocab_size",
    "vocab_size",
)  # fmt: skip
ADDED_FIELDS = {"directionality": "bidi", "pooler_type": "first_token_transform"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model class, what its config changes, and how its variables are kept."""

    model_class: str
    cased: bool
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    slots: bool = False  # of the optimizer, and the step: a checkpoint of a run, not a release


CASES = {
    "tensorflow-megatron-bert": Case("MegatronBertForPreTraining", cased=False, slots=True),
    "tensorflow-bert": Case("BertForPreTraining", cased=True),
    "tensorflow-bfloat16": Case(
        "MegatronBertModel", cased=False, config={"num_hidden_layers": 1}, dtype=torch.bfloat16
    ),
}


def vocabulary(cased: bool) -> list[str]:
    letters = string.ascii_letters if cased else string.ascii_lowercase + string.digits
    return ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]


def make_model(case: Case, seed: int) -> PreTrainedModel:
    """In evaluation mode, with generic values everywhere: no parameter is zero, one or a twin."""
    model_class = getattr(transformers, case.model_class)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(vocab_size=len(vocabulary(case.cased)), **{**SMALL, **case.config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
            parameter.copy_(parameter.to(case.dtype))
    return model.eval()


def variables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's parameters under the names, and in the shapes, of google-research/bert's graph."""
    found = {}
    for key, value in model.named_parameters():
        name = key if key.startswith(("bert.", "cls.")) else f"bert.{key}"
        name = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", name)
        if re.search(r"(\.ln|\.LayerNorm)\.", name):
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        elif "_embeddings." in name:
            name = name.removesuffix(".weight")
        elif name.startswith("cls.seq_relationship."):
            name = name.replace(".weight", ".output_weights").replace(".bias", ".output_bias")
        elif name == "cls.predictions.bias":
            name = "cls.predictions.output_bias"
        elif name.endswith(".weight"):
            name, value = name.removesuffix("weight") + "kernel", value.T
        found[name.replace(".", "/")] = value.detach()
    return found


def write_checkpoint(prefix: Path, tensors: dict[str, torch.Tensor], *, slots: bool) -> None:
    """With the Saver of TensorFlow 1."""
    arrays = {
        name: value.float().numpy().astype(tf.dtypes.as_dtype(str(value.dtype).removeprefix("torch.")).as_numpy_dtype)
        for name, value in tensors.items()
    }
    if slots:
        for name in ("bert/embeddings/position_embeddings", "bert/encoder/layer_1/attention/self/query/kernel"):
            arrays |= {f"{name}/adam_m": arrays[name] * 0.1, f"{name}/adam_v": arrays[name] ** 2}
        arrays["global_step"] = np.int64(20)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, array in arrays.items():
            tf.compat.v1.get_variable(name, initializer=array)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(prefix), write_meta_graph=False)
    (prefix.parent / "checkpoint").unlink()


def check_reader(case: Case, model: PreTrainedModel) -> None:
    """transformers' own reader must make the same model of a float32 checkpoint."""
    again = make_model(case, 0)
    load = load_tf_weights_in_megatron_bert if "Megatron" in case.model_class else load_tf_weights_in_bert
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "bert_model.ckpt"
        write_checkpoint(prefix, variables(model), slots=case.slots)
        target: Any = again
        if not hasattr(model, "bert"):  # the reader looks for `bert` in what it is given
            target = torch.nn.Module()
            target.bert = again
        load(target, model.config, str(prefix))
    for key, value in model.state_dict().items():
        if not torch.equal(value, again.state_dict()[key]):
            raise AssertionError(f"transformers reads another {key}")


@torch.no_grad()
def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output = model(**inputs, output_hidden_states=True, return_dict=True)
    tensors = {"last_hidden_state": output.hidden_states[-1]}
    if "prediction_logits" in output:
        tensors |= {"logits": output.prediction_logits, "seq_relationship_logits": output.seq_relationship_logits}
    else:
        tensors["last_hidden_state"] = output.last_hidden_state
    return tensors


def make_case(name: str, root: Path) -> None:
    case, folder, seed = CASES[name], root / name, zlib.crc32(name.encode())
    model = make_model(case, seed)
    check_reader(case, model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 13:] = ids[1, 13:] = 0
    types = torch.randint(0, 2, ids.shape, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    outputs = run(model, inputs)
    exact = run(make_model(case, seed).double(), inputs)
    for key, value in outputs.items():
        if (error := ((value - exact[key]).abs().max() / exact[key].abs().max()).item()) > LARGEST_ERROR:
            raise AssertionError(f"float32 is {error:.1e} off in {key}: change the draw")

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors = {variable: value.to(case.dtype) for variable, value in variables(model).items()}
    write_checkpoint(folder / "bert_model.ckpt", tensors, slots=case.slots)
    fields = {field: getattr(model.config, field) for field in FIELDS} | ADDED_FIELDS
    (folder / "bert_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    (folder / "vocab.txt").write_text("\n".join(vocabulary(case.cased)) + "\n")
    parameters = {key: value.detach().to(case.dtype) for key, value in model.named_parameters()}
    save_file(parameters, folder / "reference.safetensors")
    save_file(inputs, folder / "inputs.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    versions = {"tensorflow": tf.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    description = {"case": name, "model_class": case.model_class, **versions, "seed": seed}
    (folder / "case.json").write_text(json.dumps(description | {"made_by": Path(__file__).name}, indent=1) + "\n")
    print(f"{name}: {sum(file.stat().st_size for file in folder.iterdir()) / 1000:.0f} kB")


def main() -> None:
    torch.set_num_threads(1)
    for name in CASES:
        make_case(name, Path(__file__).resolve().parent)


if __name__ == "__main__":
    main()
