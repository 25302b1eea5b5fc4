"""TensorFlow's checkpoints against the models of transformers that they were written from."""

from __future__ import annotations

import gc
import json
import os
import shutil
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import farspan
from farspan.pretrain.conversion import tensorflow as tf
from farspan.pretrain.conversion.imported import Imported, write_imported
from farspan.pretrain.conversion.renaming import rename
from farspan.pretrain.conversion.tensorflow import (
    Variable,
    find_prefix,
    make_plan,
    read_config,
    read_model,
    variable_name,
)
from farspan.pretrain.models.huggingface_keys import tensor_names

GOLDEN = Path(__file__).parents[1] / "golden"
MEGATRON, BERT, BFLOAT16 = (GOLDEN / f"tensorflow-{name}" for name in ("megatron-bert", "bert", "bfloat16"))
DATA = "bert_model.ckpt.data-00000-of-00001"


@pytest.fixture(scope="session")
def python() -> Path:
    """An interpreter with TensorFlow."""
    if named := os.environ.get("FARSPAN_TENSORFLOW_PYTHON"):
        return Path(named)
    if find_spec("tensorflow") is None:
        pytest.skip("TensorFlow is not installed, and FARSPAN_TENSORFLOW_PYTHON names no interpreter that has it")
    return Path(sys.executable)


@pytest.fixture(scope="module")
def megatron(python: Path) -> Imported:
    return read_model(MEGATRON, python=python)


@pytest.fixture(scope="module")
def warm(python: Path) -> Imported:
    return read_model(BERT / "bert_model.ckpt", warm_start=True, python=python)


def tensors(model: Imported) -> dict[str, torch.Tensor]:
    """Under Hugging Face's names."""
    keys = model.cls.huggingface_keys(model.config, model.heads)
    return rename({name: model.read(name) for name in model.shapes()}, keys)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# What becomes of the weights.


def test_megatron_bert_gives_the_same_logits(megatron: Imported, tmp_path: Path) -> None:
    write_imported(megatron, tmp_path / "out")
    model = farspan.load(tmp_path / "out")
    assert megatron.note is None
    assert model.network.heads == ("lm", "nsp")
    reference = load_file(MEGATRON / "reference.safetensors")
    state = model.huggingface_state()
    assert state.keys() == reference.keys()
    assert all(same(value, reference[key]) for key, value in state.items())
    inputs, expected = (load_file(MEGATRON / f"{name}.safetensors") for name in ("inputs", "outputs"))
    with torch.no_grad():
        output = model(**inputs)
    real = inputs["attention_mask"].bool()
    for name in ("logits", "last_hidden_state"):
        torch.testing.assert_close(getattr(output, name)[real], expected[name][real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        output.seq_relationship_logits, expected["seq_relationship_logits"], rtol=1e-5, atol=1e-5
    )


def test_dtypes_and_a_model_without_heads(python: Path, tmp_path: Path) -> None:
    model = read_model(BFLOAT16 / "bert_model.ckpt.index", python=python)
    assert model.heads == ()
    assert set(model.dtypes) == set(model.shapes())
    assert set(model.dtypes.values()) == {torch.bfloat16}
    reference = load_file(BFLOAT16 / "reference.safetensors")
    found = tensors(model)
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}  # no head here reads it
    assert found.keys() == reference.keys() - pooler
    assert all(same(value, reference[key]) for key, value in found.items())
    write_imported(model, tmp_path / "out")
    inputs, expected = (load_file(BFLOAT16 / f"{name}.safetensors") for name in ("inputs", "outputs"))
    hidden = farspan.load(tmp_path / "out")(**inputs).last_hidden_state.detach()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[real], expected["last_hidden_state"][real], rtol=1e-5, atol=1e-5)


def test_warm_start_puts_each_norm_where_it_was_read(warm: Imported) -> None:
    assert warm.note == tf.WARM_START
    reference = load_file(BERT / "reference.safetensors")
    found = tensors(warm)
    layer = "bert.encoder.layer"
    norms = {
        f"{layer}.0.attention.ln": "bert.embeddings.LayerNorm",
        f"{layer}.0.ln": f"{layer}.0.attention.output.LayerNorm",
        f"{layer}.1.attention.ln": f"{layer}.0.output.LayerNorm",
        f"{layer}.1.ln": f"{layer}.1.attention.output.LayerNorm",
        f"{layer}.2.attention.ln": f"{layer}.1.output.LayerNorm",
        f"{layer}.2.ln": f"{layer}.2.attention.output.LayerNorm",
        "bert.encoder.ln": f"{layer}.2.output.LayerNorm",
    }
    places = {f"{a}.{kind}": f"{b}.{kind}" for a, b in norms.items() for kind in ("weight", "bias")}
    assert sorted(places.get(key, key) for key in found) == sorted(reference)
    assert all(same(value, reference[places.get(key, key)]) for key, value in found.items())


@pytest.mark.parametrize(
    ("key", "name", "post_norm"),
    [
        ("bert.embeddings.token_type_embeddings.weight", "bert/embeddings/token_type_embeddings", None),
        ("embeddings.word_embeddings.weight", "bert/embeddings/word_embeddings", None),
        ("bert.encoder.layer.11.attention.ln.weight", "bert/encoder/layer_11/attention/ln/gamma", None),
        ("bert.encoder.layer.11.ln.bias", "bert/encoder/layer_11/ln/beta", None),
        ("bert.encoder.ln.bias", "bert/encoder/ln/beta", None),
        ("bert.encoder.layer.0.attention.ln.weight", "bert/embeddings/LayerNorm/gamma", 12),
        ("bert.encoder.layer.11.attention.ln.weight", "bert/encoder/layer_10/output/LayerNorm/gamma", 12),
        ("bert.encoder.layer.11.ln.bias", "bert/encoder/layer_11/attention/output/LayerNorm/beta", 12),
        ("bert.encoder.ln.bias", "bert/encoder/layer_11/output/LayerNorm/beta", 12),
        ("bert.encoder.layer.3.attention.self.key.weight", "bert/encoder/layer_3/attention/self/key/kernel", 12),
        ("bert.encoder.layer.3.intermediate.dense.bias", "bert/encoder/layer_3/intermediate/dense/bias", None),
        ("bert.pooler.dense.weight", "bert/pooler/dense/kernel", None),
        ("cls.predictions.bias", "cls/predictions/output_bias", 12),
        ("cls.predictions.transform.LayerNorm.weight", "cls/predictions/transform/LayerNorm/gamma", 12),
        ("cls.predictions.transform.dense.bias", "cls/predictions/transform/dense/bias", None),
        ("cls.seq_relationship.weight", "cls/seq_relationship/output_weights", None),
        ("cls.seq_relationship.bias", "cls/seq_relationship/output_bias", None),
    ],
)
def test_names(key: str, name: str, post_norm: int | None) -> None:
    """As github.com/google-research/bert (modeling.py, run_pretraining.py) and transformers name them."""
    assert variable_name(key, post_norm) == name


# What is refused.


def described(heads: tuple[str, ...] = ("lm", "nsp"), post_norm: bool = False) -> dict[str, Variable]:
    """The variables of a checkpoint of the same configuration as ``MEGATRON``."""
    config = read_config(MEGATRON / "bert_config.json")
    shapes = tf.logical_shapes(tf.MegatronBert, config, heads)
    keys = tf.MegatronBert.huggingface_keys(config, heads)
    found = {}
    for key, value in rename({name: torch.empty(shape) for name, shape in shapes.items()}, keys).items():
        name = variable_name(key, config.num_hidden_layers if post_norm else None)
        found[name] = Variable("float32", tuple(value.t().shape if name.endswith("/kernel") else value.shape))
    return found


def plan(variables: dict[str, Variable], warm_start: bool = False) -> tf.Plan:
    config = read_config(MEGATRON / "bert_config.json")
    return make_plan(variables, config, Path("model.ckpt"), Path("bert_config.json"), warm_start=warm_start)


@pytest.mark.parametrize("heads", [("lm", "nsp"), ("lm",), ("nsp",), ()])
@pytest.mark.parametrize("post_norm", [False, True])
def test_heads_and_what_an_optimizer_keeps(heads: tuple[str, ...], post_norm: bool) -> None:
    variables = described(heads, post_norm)
    scalar = Variable("int64", ())
    slots = {f"{name}/{slot}": variable for name, variable in variables.items() for slot in ("adam_m", "adam_v")}
    pooler = {
        "bert/pooler/dense/kernel": Variable("float32", (32, 32)),
        "bert/pooler/dense/bias": Variable("float32", (32,)),
    }
    found = plan(variables | slots | pooler | {"global_step": scalar, "beta1_power": scalar}, warm_start=post_norm)
    assert found.heads == heads
    assert found.names.keys() == tensor_names(found.keys)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"output_weights": Variable("float32", (2, 32))},
            "1 variables that .* such as output_weights: importing would",
        ),
        ({"bert/encoder/layer_3/ln/gamma": Variable("float32", (32,))}, "has 4 layers, bert_config.json a .* of 3"),
        ({"bert/embeddings/LayerNorm/gamma": Variable("float32", (32,))}, "it is neither"),
        (
            {"bert/encoder/layer_0/output/dense/kernel": Variable("float32", (32, 48))},
            r"layer_0/output/dense/kernel in model.ckpt has shape \(32, 48\), bert_config.json makes it \(48, 32\)",
        ),
        (
            {"bert/encoder/ln/gamma": Variable("float64", (32,))},
            "is of type float64: one of float32, bfloat16, float16",
        ),
        ({"bert/encoder/layer_1/ln/beta": None}, "lacks variables of .* such as bert/encoder/layer_1/ln/beta$"),
        ({"cls/predictions/output_bias": None}, "such as cls/predictions/"),
        ({"bert/encoder/ln/gamma": None}, r"is no BERT \(its variables: bert/embeddings/position_embeddings, …\)"),
    ],
)
def test_variables_that_do_not_fit(change: dict[str, Variable | None], line: str) -> None:
    variables = {name: value for name, value in (described() | change).items() if value is not None}
    with pytest.raises(ValueError, match=line) as caught:
        plan(variables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"num_attention_heads": ..., "vocab_size": ...},
            "bert_config.json lacks vocab_size, num_attention_heads: give",
        ),
        ({"hidden_act": "tanhexp"}, "hidden_act 'tanhexp' is unknown"),
        ({"num_attention_heads": 5}, "hidden_size 32 does not divide by num_attention_heads 5"),
        ({"intermediate_size": "many"}, "intermediate_size = 'many'"),
        ({"vocab_size": 77}, "a vocab_size of 77, the vocab.txt of the checkpoint 78 tokens"),
        ({"num_hidden_layers": 10**12}, "has 3 layers, .*bert_config.json a num_hidden_layers of 1000000000000"),
        ({"vocab_size": 97}, r"has shape \(78,( 32)?\), .*bert_config.json makes it \(97,( 32)?\)"),
        ({"position_embedding_type": "relative_key"}, "lacks variables of .* such as .*/distance_embedding/kernel"),
    ],
)
def test_configuration_that_does_not_fit(tmp_path: Path, changed: dict[str, Any], line: str) -> None:
    fields = json.loads((MEGATRON / "bert_config.json").read_text()) | changed
    file = tmp_path / "bert_config.json"
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
    vocabulary = (MEGATRON / "vocab.txt").read_text().split()
    with pytest.raises(ValueError, match=line) as caught:
        make_plan(described(), read_config(file, vocabulary), Path("model.ckpt"), file, warm_start=False)
    assert "\n" not in str(caught.value)


def test_other_checkpoints_of_tensorflow() -> None:
    keras = {"model/layer/kernel/.ATTRIBUTES/VARIABLE_VALUE": Variable("float32", (2, 2))}
    with pytest.raises(ValueError, match="is an object-based checkpoint of TensorFlow 2"):
        plan(keras)
    with pytest.raises(ValueError, match="none at all"):
        plan({"global_step": Variable("int64", ())})
    with pytest.raises(ValueError, match=r"converts exactly: leave warm_start .* out"):
        plan(described(), warm_start=True)


def test_original_bert_needs_the_option() -> None:
    with pytest.raises(ValueError, match=r"is an original BERT, .*other logits.*set warm_start"):
        plan(described(post_norm=True))


def test_types() -> None:
    variables = described() | {"bert/encoder/ln/gamma": Variable("float16", (32,))}
    dtypes = tf.logical_dtypes(variables, plan(variables), Path("model.ckpt"))
    assert {name for name, dtype in dtypes.items() if dtype == torch.float16} == {"final_norm.weight"}
    assert set(dtypes.values()) == {torch.float16, torch.float32}
    variables["bert/encoder/layer_1/attention/self/key/bias"] = Variable("float16", (32,))
    with pytest.raises(ValueError, match=r"layer_1/attention/self/query/bias, .* in model\.ckpt are of 2 types"):
        tf.logical_dtypes(variables, plan(variables), Path("model.ckpt"))


def test_finding_the_files(tmp_path: Path) -> None:
    for given in (MEGATRON, MEGATRON / "bert_model.ckpt", MEGATRON / "bert_model.ckpt.index"):
        assert find_prefix(given) == MEGATRON / "bert_model.ckpt"
    with pytest.raises(ValueError, match="has no TensorFlow checkpoint"):
        find_prefix(tmp_path)
    with pytest.raises(ValueError, match=r"model\.ckpt-2\.index is missing"):
        find_prefix(tmp_path / "model.ckpt-2")
    (tmp_path / "a.index").touch()
    with pytest.raises(ValueError, match=r"a\.data-00000-of-00001 is missing"):
        find_prefix(tmp_path)
    (tmp_path / "b.index").touch()
    with pytest.raises(ValueError, match=r"has 2 checkpoints: give one of them, such as .*b.index"):
        find_prefix(tmp_path)


def test_no_configuration(tmp_path: Path) -> None:
    folder = shutil.copytree(MEGATRON, tmp_path / "source")
    (folder / "bert_config.json").unlink()
    with pytest.raises(ValueError, match=r"bert_config.json is missing"):
        read_model(folder)


def test_no_tensorflow(tmp_path: Path) -> None:
    bare = tmp_path / "bare"  # an interpreter without packages
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ValueError, match=r"TensorFlow, .* is not installed for .*bare: pip install 'farspan\[tensor"):
        read_model(MEGATRON, python=bare)
    with pytest.raises(ValueError, match="nowhere does not run"):
        read_model(MEGATRON, python=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="TensorFlow does not start in /bin/false"):
        read_model(MEGATRON, python=Path("/bin/false"))


# Damage.


def crc32c(data: bytes) -> int:
    """RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return shutil.copytree(MEGATRON, tmp_path / "source")


def change(path: Path, place: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] = value
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damaged_weights(python: Path, copied: Path, tmp_path: Path, damage: str) -> None:
    data = (copied / DATA).read_bytes()
    if damage == "flipped":
        change(copied / DATA, 60_000, data[60_000] ^ 1)
    else:
        (copied / DATA).write_bytes(data[:60_000])
    with pytest.raises(ValueError, match=r"cannot be read by TensorFlow .* it is damaged") as caught:
        write_imported(read_model(copied, python=python), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "hostile"])
def test_damaged_index(python: Path, copied: Path, damage: str) -> None:
    index = copied / "bert_model.ckpt.index"
    data = index.read_bytes()
    place = data.index(b"global_step") + len("global_step")  # an entry begins: a key of protocol buffers
    if damage == "cut":
        index.write_bytes(data[:-100])
    else:
        change(index, place, 0x07)  # there is no wire type 7
    if damage == "hostile":  # with a checksum that fits (LevelDB's table format); TensorFlow ends the process over it
        end = (data[-48] & 0x7F | data[-47] << 7) - 5  # of the one block: the footer begins with where the next is
        crc = crc32c(index.read_bytes()[: end + 1])
        masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        for i, byte in enumerate(struct.pack("<I", masked)):
            change(index, end + 1 + i, byte)
    reason = "it ended the process that read it" if damage == "hostile" else ".*"
    with pytest.raises(ValueError, match=rf"cannot be read by TensorFlow \({reason}\): it is damaged") as caught:
        read_model(copied, python=python)
    assert "\n" not in str(caught.value)


def test_the_process_ends_with_the_model(python: Path) -> None:
    model = read_model(BFLOAT16, python=python)
    process: subprocess.Popen[bytes] = model.read.__self__._checkpoint._process  # type: ignore[attr-defined]
    assert process.poll() is None
    del model
    gc.collect()
    assert process.poll() is not None


# Tokenizers.


def test_tokenizer(megatron: Imported, warm: Imported, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = {}
    for name, model in {"uncased": megatron, "cased": warm}.items():
        write_imported(model, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name / "tokenizer")
        words[name] = tokenizer.tokenize("Ab é")
        assert tokenizer.convert_tokens_to_ids(["[PAD]", "[CLS]", "a"]) == [0, 3, 6]
    assert words == {"uncased": ["a", "##b", "e"], "cased": ["A", "##b", "[UNK]"]}


def test_case_of_the_tokenizer() -> None:
    assert tf._cased(["[PAD]", "[UNK]", "a", "##b", "中"], None) is True
    assert tf._cased(["[PAD]", "a", "##B"], None) is False
    assert tf._cased(["a", "B"], True) is True
    assert tf._cased([], True) is None


def test_files_of_a_tokenizer_as_they_are(python: Path, copied: Path) -> None:
    (copied / "tokenizer_config.json").write_text("{}\n")
    assert read_model(copied, python=python).tokenizer == copied


def test_options(python: Path, copied: Path, tmp_path: Path) -> None:
    shutil.move(copied / "bert_config.json", tmp_path / "other.json")
    (copied / "vocab.txt").write_text("a\n[PAD]\n")
    model = read_model(copied, config=tmp_path / "other.json", hidden_act="gelu_new", lower_case=False, python=python)
    assert (model.config.hidden_act, model.config.pad_token_id) == ("gelu_new", 1)  # type: ignore[attr-defined]
    assert model.tokenizer is not None
    assert json.loads((model.tokenizer / "tokenizer_config.json").read_text())["do_lower_case"] is False
