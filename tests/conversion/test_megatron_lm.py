"""Megatron-LM's BERT checkpoints: of Megatron-LM's own code, and of a writer of our own in every layout."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_lm_files as files
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_lm_files import Layout
from safetensors.torch import load_file
from torch import Tensor
from transformers import MegatronBertForPreTraining

import farspan
from farspan.pretrain.conversion import megatron_lm_files as reading
from farspan.pretrain.conversion.imported import Imported, write_imported
from farspan.pretrain.conversion.megatron_lm import read_model
from farspan.pretrain.conversion.renaming import rename
from farspan.pretrain.load import LoadedModel

GOLDEN = Path(__file__).parent.parent / "golden"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def loaded(imported: Imported, folder: Path) -> LoadedModel:
    write_imported(imported, folder)
    return farspan.load(folder)


def huggingface(imported: Imported) -> dict[str, Tensor]:
    keys = imported.cls.huggingface_keys(imported.config, imported.heads)
    return rename({name: imported.read(name) for name in imported.dtypes}, keys)


def assert_same(imported: Imported, source: MegatronBertForPreTraining) -> None:
    """Every tensor of both models is the same, bit for bit."""
    theirs, ours = source.state_dict(), huggingface(imported)
    theirs = {key: value for key, value in theirs.items() if key in ours}
    assert len(ours) == len(dict(source.named_parameters()))
    assert theirs.keys() == ours.keys()
    different = [key for key, value in theirs.items() if not torch.equal(value, ours[key])]
    assert not different


@pytest.fixture(scope="module")
def source() -> MegatronBertForPreTraining:
    return files.model()


# Of Megatron-LM's own code (tests/golden/make_megatron_lm_cases.py).

CASES = (
    "megatron-lm-v1.0", "megatron-lm-64e45f2972", "megatron-lm-v2.5", "megatron-lm-v2.5-openai-gelu",
    "megatron-lm-23.04", "megatron-lm-core",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_of_megatron_lm(name: str, tmp_path: Path) -> None:
    imported = read_model(GOLDEN / name, vocab_size=43)
    model = loaded(imported, tmp_path / "out")
    reference = load_file(GOLDEN / name / "reference.safetensors")
    real = reference["attention_mask"].bool()
    given = [reference["input_ids"], reference["attention_mask"], reference.get("token_type_ids")]
    with torch.no_grad():
        output = model(*given)
    torch.testing.assert_close(output.logits[real], reference["logits"][..., :43][real], **CLOSE)
    assert ("nsp" in imported.heads) == ("seq_relationship_logits" in reference)
    if "nsp" in imported.heads:
        assert output.seq_relationship_logits is not None
        torch.testing.assert_close(output.seq_relationship_logits, reference["seq_relationship_logits"], **CLOSE)


def test_tensors_of_the_public_converter() -> None:
    """converted.safetensors is what transformers 4.37.2's convert_megatron_bert_checkpoint.py makes of the case."""
    folder = GOLDEN / "megatron-lm-v2.5-openai-gelu"
    ours, theirs = huggingface(read_model(folder)), load_file(folder / "converted.safetensors")
    assert theirs.keys() - ours.keys() == {"cls.predictions.decoder.weight"}
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


# Of a writer of our own, from a transformers model.

LAYOUTS = [
    Layout(version=version, tensor=tensor, pipeline=pipeline, names=names)
    for version, names in ((0, "2020"), (1.0, "2020"), (2.0, "2021"), (3.0, "2023"))
    for tensor in (1, 2, 4)
    for pipeline in (1, 2)
]
OTHERS = [
    Layout(pipeline=2, chunks=2),
    Layout(tensor=2, pipeline=2, chunks=2, names="core"),
    Layout(tensor=2, pipeline=2, names="fused"),
    Layout(names="core"),
    Layout(version=0, tensor=2, old_file=True),
]


@pytest.mark.parametrize("layout", [*LAYOUTS, *OTHERS], ids=str)
def test_every_layout_gives_the_same_tensors(
    layout: Layout, source: MegatronBertForPreTraining, tmp_path: Path
) -> None:
    files.write(tmp_path, source, layout)
    imported = read_model(tmp_path, vocab_size=43)
    assert imported.heads == ("lm", "nsp")
    assert_same(imported, source)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_logits_of_transformers(activation: str, tmp_path: Path) -> None:
    source = files.model(hidden_act=activation)
    files.write(tmp_path / "in", source, Layout(version=1.0, tensor=2, pipeline=2))
    model = loaded(read_model(tmp_path / "in", vocab_size=43), tmp_path / "out")
    ids = torch.randint(43, (3, 15), generator=torch.Generator().manual_seed(0))
    mask, kinds = torch.ones_like(ids), ids % 2
    mask[1, 7:] = 0
    with torch.no_grad():
        ours, theirs = model(ids, mask, kinds), source(ids, mask, kinds)
    torch.testing.assert_close(ours.logits[mask.bool()], theirs.prediction_logits[mask.bool()], **CLOSE)
    assert ours.seq_relationship_logits is not None
    torch.testing.assert_close(ours.seq_relationship_logits, theirs.seq_relationship_logits, **CLOSE)
    config: Any = model.config
    assert (config.hidden_act, config.layer_norm_eps) == (activation, 1e-5)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.2, 0.05)
    assert config.initializer_range == 0.01


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_layout(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    tensor, pipeline, chunks = (data.draw(st.integers(1, 3), label=name) for name in ("tensor", "pipeline", "chunks"))
    chunks = chunks if pipeline > 1 else 1
    heads = tensor * data.draw(st.integers(1, 2), label="heads of a rank")
    width, vocabulary = data.draw(st.integers(1, 3), label="width"), data.draw(st.integers(2, 9), label="vocabulary")
    padded = -(-vocabulary // tensor) * tensor + tensor * data.draw(st.integers(0, 5), label="rows that pad")
    layout = Layout(
        version=data.draw(st.sampled_from([0, 1.0, 2.0, 3.0])), tensor=tensor, pipeline=pipeline, chunks=chunks,
        names=data.draw(st.sampled_from(["2020", "2021", "2023"])), padded=padded,
    )  # fmt: skip
    source = files.model(
        vocab_size=vocabulary, hidden_size=heads * width, num_attention_heads=heads,
        num_hidden_layers=pipeline * chunks * data.draw(st.integers(1, 2), label="layers of a chunk"),
        intermediate_size=tensor * 3, max_position_embeddings=5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("any")
    files.write(folder, source, layout)
    assert_same(read_model(folder, vocab_size=vocabulary), source)


def test_every_kind_of_path(source: MegatronBertForPreTraining, tmp_path: Path) -> None:
    iteration = files.write(tmp_path / "top", source, Layout(version=0, names="2020"))
    part = iteration / "mp_rank_00"
    for path in (tmp_path / "top", iteration, part, part / "model_optim_rng.pt"):
        assert_same(read_model(path, vocab_size=43), source)
    release = tmp_path / "released" / "release"
    shutil.copytree(iteration, release)
    (tmp_path / "released" / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert_same(read_model(tmp_path / "released", vocab_size=43), source)
    (release / "mp_rank_00" / "model_optim_rng.pt").rename(release / "mp_rank_00" / "model_rng.pt")
    assert_same(read_model(release, vocab_size=43), source)


@pytest.mark.parametrize("old_file", [True, False])
def test_zip_of_released_weights(old_file: bool, source: MegatronBertForPreTraining, tmp_path: Path) -> None:
    layout = Layout(version=0, tensor=2, names="2020", args=False, old_file=old_file)
    iteration = files.write(tmp_path / "top", source, layout)
    path = tmp_path / "released.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for rank in ("mp_rank_00", "mp_rank_01"):
            archive.write(iteration / rank / "model_optim_rng.pt", f"release/{rank}/model_optim_rng.pt")
    with pytest.raises(ValueError, match="set num_attention_heads"):
        read_model(path)
    imported = read_model(path, num_attention_heads=4, vocab_size=43)
    assert_same(imported, source)
    config: Any = imported.config
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu", 1e-5)
    assert not list(tmp_path.glob("release"))


def test_vocabulary(source: MegatronBertForPreTraining, tmp_path: Path) -> None:
    files.write(tmp_path, source, Layout(tensor=2, args=False))
    options: dict[str, Any] = {"num_attention_heads": 4}
    kept = read_model(tmp_path, **options)
    assert kept.config.vocab_size == 48
    assert kept.read("embeddings.words.weight").shape == (48, 16)
    assert "48 rows" in str(kept.note)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    tokens = [*(f"token{i}" for i in range(38)), "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    (tokenizer / "vocab.txt").write_text("\n".join(tokens) + "\n")
    cut = read_model(tmp_path, tokenizer=tokenizer, **options)
    assert (cut.config.vocab_size, cut.tokenizer, cut.note) == (43, tokenizer, None)
    assert cut.config.pad_token_id == 39
    assert_same(cut, source)
    assert read_model(tmp_path, tokenizer=tokenizer, vocab_size=45, **options).config.vocab_size == 45
    for size in (0, 49):
        with pytest.raises(ValueError, match="48 rows"):
            read_model(tmp_path, vocab_size=size, **options)
    with pytest.raises(ValueError, match="43 tokens"):
        read_model(tmp_path, tokenizer=tokenizer, vocab_size=42, **options)


def test_types_stay_as_they_are(tmp_path: Path) -> None:
    source = files.model().to(torch.bfloat16)
    files.write(tmp_path, source, Layout(tensor=2, pipeline=2))
    imported = read_model(tmp_path, vocab_size=43)
    assert set(imported.dtypes.values()) == {torch.bfloat16}
    assert_same(imported, source)


def test_copies_that_drifted_apart_are_said(source: MegatronBertForPreTraining, tmp_path: Path) -> None:
    iteration = files.write(tmp_path, source, Layout(tensor=2, pipeline=2))
    assert "differ" not in str(read_model(tmp_path, vocab_size=43).note)
    path = iteration / "mp_rank_01_001" / "model_optim_rng.pt"
    for change, name in (
        (lambda model: model["lm_head"]["layernorm.bias"].add_(1), "lm_head.norm.bias"),
        (lambda model: model["word_embeddings_for_head"]["weight"].add_(1), "embeddings.words.weight"),
    ):
        original = path.read_bytes()
        spoil(path, lambda state, change=change: change(state["model"]))
        imported = read_model(tmp_path, vocab_size=43)
        assert f"such as {name}: the first part's were taken" in str(imported.note)
        assert_same(imported, source)
        path.write_bytes(original)


def test_an_untied_head_of_megatron_core(source: MegatronBertForPreTraining, tmp_path: Path) -> None:
    iteration = files.write(tmp_path, source, Layout(names="core", pipeline=2))
    path = iteration / "mp_rank_00_001" / "model_optim_rng.pt"
    spoil(path, lambda state: state["model"]["output_layer.weight"].add_(1))
    for part in iteration.glob("*/*.pt"):
        spoil(part, lambda state: setattr(state["args"], "untie_embeddings_and_output_weights", True))
    imported = read_model(tmp_path, vocab_size=43)
    assert not imported.config.tie_word_embeddings
    expected = source.state_dict()["bert.embeddings.word_embeddings.weight"] + 1
    assert torch.equal(imported.read("lm_head.decoder.weight"), expected)


def test_few_pages_of_mapped_files_are_kept(
    source: MegatronBertForPreTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_TOUCHED", 2000)
    forgotten: list[str] = []
    forget = reading.PartFile.forget
    monkeypatch.setattr(reading.PartFile, "forget", lambda self: (forgotten.append(self.where), forget(self))[1])
    files.write(tmp_path, source, Layout(tensor=2, pipeline=2))
    assert_same(read_model(tmp_path, vocab_size=43), source)
    assert len(forgotten) > 20


# Nothing in a file is run.


class Runs:
    """Pickled, a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("old_file", [True, False])
@pytest.mark.parametrize("key", ["args", "model", "optimizer", "random_rng_state"])
def test_nothing_in_a_file_is_run(key: str, old_file: bool, source: MegatronBertForPreTraining, tmp_path: Path) -> None:
    import os
    import subprocess

    path, mark = tmp_path / "model_optim_rng.pt", tmp_path / "mark"
    state = files.parts(source, Layout())[0, 0]
    for function, arguments, name in (
        (os.system, (f"touch {mark}",), "posix.system"),
        (subprocess.call, (["touch", str(mark)],), "subprocess.call"),
        (eval, (f"open({str(mark)!r}, 'w')",), "builtins.eval"),
        (exec, (f"open({str(mark)!r}, 'w')",), "builtins.exec"),
        (shutil.copyfile, (__file__, str(mark)), "shutil.copyfile"),
    ):
        files.save(path, state | {key: Runs(function, *arguments)}, old_file=old_file)
        with pytest.raises(ValueError, match=f"{path} names {name}, .* nothing of it was run") as error:
            read_model(path)
        assert "\n" not in str(error.value)
        assert not mark.exists()


def test_what_other_packages_pickle_stays_inert(source: MegatronBertForPreTraining, tmp_path: Path) -> None:
    path, mark = tmp_path / "model_optim_rng.pt", tmp_path / "mark.npy"
    state = files.parts(source, Layout())[0, 0]
    state["optimizer"] = Runs(np.save, str(mark), 1)
    state["args"].timers = Runs(np.save, str(mark), 1)
    state["args"].attention_backend = Runs(getattr, Layout, "version")
    files.save(path, state)
    assert_same(read_model(path, vocab_size=43), source)
    assert not mark.exists()


def test_what_others_declared_safe_stays_so_and_is_not_used(
    source: MegatronBertForPreTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(tmp_path, source)
    during: list[Any] = []
    load = torch.load

    def loading(*given: Any, **options: Any) -> Any:
        during.extend(torch.serialization.get_safe_globals())
        return load(*given, **options)

    monkeypatch.setattr(torch, "load", loading)
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        assert read_model(tmp_path).config.hidden_size == 16
        assert set(torch.serialization.get_safe_globals()) == before
    assert during
    assert argparse.Namespace not in during


# What cannot be taken.


def spoil(path: Path, change: Callable[[Any], Any]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def at(rank: str) -> Callable[[Path], Path]:
    return lambda iteration: iteration / f"mp_rank_{rank}" / "model_optim_rng.pt"


def everywhere(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda iteration: [spoil(path, change) for path in iteration.glob("*/*.pt")][:0] and None


def argument(name: str, value: Any) -> Callable[[Path], None]:
    return everywhere(lambda state: setattr(state["args"], name, value))


def in_one(change: Callable[[Any], Any], rank: str = "01_001") -> Callable[[Path], None]:
    return lambda iteration: spoil(at(rank)(iteration), change)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "part missing": (lambda i: shutil.rmtree(i / "mp_rank_01_000"), "lacks the file of tensor rank 1, "),
    "tensor rank missing": (lambda i: [shutil.rmtree(i / f"mp_rank_01_00{p}") for p in (0, 1)], "has 1 of the 2 parts"),
    "stage missing": (lambda i: [shutil.rmtree(i / f"mp_rank_0{t}_001") for t in (0, 1)], "has 1 of the 2 parts"),
    "part twice": (lambda i: shutil.copytree(i / "mp_rank_01_001", i / "mp_rank_1_1"), "two files of tensor rank 1"),
    "strange part": (lambda i: (i / "mp_rank_01_001").rename(i / "other"), "a part named other"),
    "experts": (lambda i: (i / "mp_rank_01_001").rename(i / "mp_rank_01_001_000"), "experts"),
    "iteration": (in_one(lambda s: s.update(iteration=8)), "mp_rank_01_001.* is of iteration 8"),
    "version": (in_one(lambda s: s.update(checkpoint_version=1.0)), "mp_rank_01_001.* is of version 1.0"),
    "new version": (everywhere(lambda s: s.update(checkpoint_version=4.0)), "checkpoint_version 4.0"),
    "shape": (
        in_one(lambda s: s["model"]["lm_head"].update(bias=torch.zeros(23))),
        r"mp_rank_01_001.*lm_head.bias is \[23\] of torch.float32, where \[24\]",
    ),
    "type": (
        in_one(lambda s: s["model"]["lm_head"].update(bias=torch.zeros(24, dtype=torch.float16))),
        r"mp_rank_01_001.*of torch.float16, where \[24\] of one floating-point type",
    ),
    "no tensor": (in_one(lambda s: s["model"]["lm_head"].update(bias=3)), "lm_head.bias is a int"),
    "only one rank has it": (in_one(lambda s: s["model"]["lm_head"].pop("bias")), "is not in every tensor rank's file"),
    "unknown": (
        everywhere(lambda s: s["model"].update(classification_head={"weight": torch.zeros(2, 16)})),
        "classification_head.weight, which no BERT model of Megatron-LM has",
    ),
    "head missing": (
        lambda i: [spoil(at(f"0{t}_001")(i), lambda s: s["model"].pop("binary_head")) for t in (0, 1)],
        "lacks 2 tensors, such as sentence_head.classifier.bias",
    ),
    "no heads": (
        lambda i: [
            spoil(at(f"0{t}_001")(i), lambda s: [s["model"].pop(k) for k in ("binary_head", "lm_head",
                  "word_embeddings_for_head")] + [s["model"]["language_model"].pop("pooler")])
            for t in (0, 1)
        ],
        "neither lm_head nor binary_head",
    ),
    "layer missing": (
        lambda i: [
            spoil(at(f"0{t}_000")(i), lambda s: [s["model"]["language_model"]["encoder"].pop(k)
                  for k in list(s["model"]["language_model"]["encoder"]) if "layers.1" in k])
            for t in (0, 1)
        ],
        "tensors of num_hidden_layers 3, its num_layers says 4",
    ),
    "no model": (in_one(lambda s: s.pop("model")), "holds no model"),
    "size": (argument("hidden_size", 32), "hidden_size 16, its hidden_size says 32"),
    "vocabulary": (argument("padded_vocab_size", 64), "its padded_vocab_size says 64"),
    "heads": (argument("num_attention_heads", 3), "3 attention heads do not divide"),
    "head width": (argument("kv_channels", 8), "heads of 8 features"),
    "after norm": (argument("apply_residual_connection_post_layernorm", True), "apply_residual_connection_post_layer"),
    "rms": (argument("normalization", "RMSNorm"), "normalization = RMSNorm"),
    "rotary": (argument("position_embedding_type", "rope"), "position_embedding_type = rope"),
    "cut": (lambda i: at("01_001")(i).write_bytes(at("01_001")(i).read_bytes()[:-900]), "mp_rank_01_001.* is damaged"),
    "text": (lambda i: at("01_001")(i).write_text("nothing"), "mp_rank_01_001.* is damaged"),
    "empty": (lambda i: at("01_001")(i).write_bytes(b""), "mp_rank_01_001.* is damaged"),
    "a list": (lambda i: torch.save([1], at("01_001")(i)), "holds no model"),
    "tracker": (lambda i: (i.parent / "latest_checkpointed_iteration.txt").write_text("../x"), "should hold a number"),
    "tracked": (lambda i: i.rename(i.parent / "iter_0000009"), "iter_0000007, which is missing"),
    "distributed": (lambda i: [shutil.rmtree(i), i.mkdir(), (i / "metadata.json").touch()], "--ckpt-convert-format"),
    "nothing": (lambda i: [shutil.rmtree(i), i.mkdir()], "has no mp_rank_"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, source: MegatronBertForPreTraining, tmp_path: Path) -> None:
    change, message = BAD[case]
    change(files.write(tmp_path, source, Layout(tensor=2, pipeline=2)))
    with pytest.raises(ValueError, match=message) as error:
        read_model(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_bad_options(source: MegatronBertForPreTraining, tmp_path: Path) -> None:
    files.write(tmp_path, source)
    for options, message in (
        ({"num_attention_heads": 2}, "num_attention_heads 2 does not fit"),
        ({"hidden_act": "swish9"}, "swish9"),
    ):
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path, **options)
    assert read_model(tmp_path, hidden_act="relu").config.model_dump()["hidden_act"] == "relu"
    with pytest.raises(ValueError, match="does not exist"):
        read_model(tmp_path / "none")


def test_the_released_size_needs_no_options(tmp_path: Path) -> None:
    """Files without arguments of 24 layers of 1024 features have 16 heads: checked on the layout's numbers alone."""
    layout = dataclasses.replace(Layout(version=0, names="2020"), args=False, padded=8)
    source = files.model(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, vocab_size=8,
                         intermediate_size=8).to(torch.bfloat16)  # fmt: skip
    files.write(tmp_path, source, layout)
    assert read_model(tmp_path).config.model_dump()["num_attention_heads"] == 16
