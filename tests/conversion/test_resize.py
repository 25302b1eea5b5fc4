from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparison import assert_all_close, assert_close, assert_identical
from models import LENGTH, Description, make_batch
from runs import MODEL, Run, settings, train_here
from torch import Tensor
from transformers import AutoTokenizer

from farspan import load
from farspan.parallel.mesh import Axis, Mesh
from farspan.parallel.sharding import initialize, logical_of
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.imported import Imported, build, write_imported
from farspan.pretrain.conversion.resize import from_checkpoint, misfit, resized
from farspan.pretrain.conversion.to_huggingface import to_huggingface
from farspan.pretrain.conversion.tokens import Tokens
from farspan.pretrain.data.tokenizer import Vocabulary, train_tokenizer
from farspan.pretrain.load import LoadedModel
from farspan.pretrain.models.base import LanguageModel

GOLDEN = Path(__file__).parents[1] / "golden"
SEED = 3
WHOLE = Axis(0, 1, None)
WORDS = {"embeddings.words.weight", "lm_head.decoder.weight", "lm_head.decoder.bias"}
POSITIONS = "embeddings.positions.weight"
ROBERTA, MEGATRON = "roberta-prelayernorm", "megatron-bert"
DECODER = {"is_decoder": True, "bidirectional": False}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": (ROBERTA, {}),
    "roberta-untied": (ROBERTA, {"tie_word_embeddings": False}),
    "megatron": (MEGATRON, {}),
    "megatron-no-padding": (MEGATRON, {"pad_token_id": None}),
    "mra": ("mra", {"max_position_embeddings": 40}),
    "nystromformer": ("nystromformer", {"num_landmarks": 4, "conv_kernel_size": 5}),
    "mega": ("mega", {}),
    "mega-chunks": ("mega", {"use_chunking": True, "chunk_size": 4}),
}
FRONT = {"roberta": 2, "megatron": 0, "mra": 2, "nystromformer": 2}  # rows before the first position's
RELATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta-key": (ROBERTA, {"position_embedding_type": "relative_key"}),
    "megatron-key-query": (MEGATRON, {"position_embedding_type": "relative_key_query"}),
    "megatron-key-decoder": (MEGATRON, {"position_embedding_type": "relative_key", "is_decoder": True}),
    "mega-simple": ("mega", {"relative_positional_bias": "simple"}),
    "mega-simple-decoder": ("mega", {"relative_positional_bias": "simple", **DECODER}),
    "mega-simple-unused-chunk": ("mega", {"relative_positional_bias": "simple", "chunk_size": 20}),
    "mega-simple-cross": ("mega", {"relative_positional_bias": "simple", "add_cross_attention": True, **DECODER}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def described(name: str, **fields: Any) -> Description:
    model_type, own = (MODELS | RELATIVE)[name]
    return Description(model_type, own | fields, torch.float64)


def logical_values(network: LanguageModel) -> dict[str, Tensor]:
    return {name: logical_of(p).merge([p.detach()]) for name, p in network.named_parameters()}


def imported(network: LanguageModel, tokenizer: Path | None = None) -> Imported:
    values = logical_values(network)
    dtypes = {name: value.dtype for name, value in values.items()}
    read = values.__getitem__
    return Imported(type(network), network.config, network.heads, read, dtypes, tokenizer)


def read_all(model: Imported) -> dict[str, Tensor]:
    values = {name: model.read(name) for name in model.dtypes}
    assert {name: tuple(value.shape) for name, value in values.items()} == model.shapes()
    assert {name: value.dtype for name, value in values.items()} == model.dtypes
    return values


@torch.no_grad()
def network_of(model: Imported) -> LanguageModel:
    network = build(model.cls, model.config, model.heads).to(torch.float64)
    for name, parameter in network.named_parameters():
        parameter.copy_(logical_of(parameter).slice(model.read(name), WHOLE, parameter.shape))
    return network.eval()


def a_new(model: Imported) -> dict[str, Tensor]:
    """What a new model of its configuration begins with."""
    network = build(model.cls, model.config, model.heads)
    initialize(network, SEED, WHOLE)
    return logical_values(network)


@torch.no_grad()
def outputs(network: LanguageModel, batch: Any) -> dict[str, Tensor]:
    return dict(network(batch, output="logits"))


def refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        action()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# The vocabulary.


@pytest.mark.parametrize("name", MODELS)
def test_a_larger_vocabulary(name: str) -> None:
    network = described(name).filled(Mesh.solo()).eval()
    old = imported(network)
    size = network.config.vocab_size
    new = resized(old, vocab_size=size + 140, seed=SEED)  # beyond the padding of the table
    assert new.config == network.config.model_copy(update={"vocab_size": size + 140})
    before, after, fresh = read_all(old), read_all(new), a_new(new)
    assert WORDS & before.keys() == {name for name in before if not torch.equal(before[name], after[name])}
    for table in WORDS & before.keys():
        assert torch.equal(after[table][:size], before[table])
        assert torch.equal(after[table][size:], fresh[table][size:].double())
    batch = make_batch(network.config, "padding")
    small, large = outputs(network, batch), outputs(network_of(new), batch)
    assert large["logits"].shape[-1] == size + 140
    large["logits"] = large["logits"][..., :size]
    for what, value in small.items():
        torch.testing.assert_close(large[what], value, rtol=1e-12, atol=1e-12)


def test_new_rows_are_of_the_seed() -> None:
    old = imported(described("roberta").filled(Mesh.solo()))
    first, again, other = (
        resized(old, vocab_size=200, seed=seed).read("embeddings.words.weight") for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[129:], other[129:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    old = imported(described("roberta").filled(Mesh.solo()).to(dtype))
    new = resized(old, vocab_size=150, positions=50)
    assert set(new.dtypes.values()) == {dtype}
    assert torch.equal(read_all(new)["embeddings.words.weight"][:129], read_all(old)["embeddings.words.weight"])


@pytest.mark.parametrize("name", MODELS | RELATIVE)
def test_nothing_changes_where_nothing_is_asked_for(name: str) -> None:
    old = imported(described(name).filled(Mesh.solo()))
    longest = old.config.longest_sequence
    for new in (resized(old), resized(old, vocab_size=129, positions=longest, method="tile")):
        assert new.config == old.config
        assert new.note is None
        assert_identical(read_all(new), read_all(old))


# Tokenizers.

TEXTS = ["the state of our union is strong", "people work for peace, with freedom", "economy nations naïve café"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of each kind, with some words in common; ``padded`` is the first wordpiece with an id that names nothing."""
    root, chooser = tmp_path_factory.mktemp("tokenizers"), random.Random(0)

    def texts(words: str) -> list[str]:
        return [" ".join(chooser.choices(words.split(), k=12)) for _ in range(200)]

    common = " ".join(TEXTS)
    for kind in ("bpe", "wordpiece"):
        size = 330 if kind == "bpe" else 110
        train_tokenizer(kind, texts(common), root / f"{kind}-a", vocab_size=size, progress=False)
        other = f"{common} senate congress law budget law law senators"
        train_tokenizer(kind, texts(other), root / f"{kind}-b", vocab_size=size + 30, progress=False)
    return root


def with_tokenizer(folder: Path, name: str = "roberta", **fields: Any) -> Imported:
    vocabulary = Vocabulary.from_folder(folder)
    fields = {"vocab_size": vocabulary.size, "pad_token_id": vocabulary.pad_id} | fields
    return imported(described(name, **fields).filled(Mesh.solo()), folder)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_tokens_keep_their_rows_under_another_tokenizer(tokenizers: Path, tmp_path: Path, kind: str) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(tokenizers / f"{kind}-{which}") for which in "ab")
    old = with_tokenizer(tokenizers / f"{kind}-a")
    new = resized(old, tokenizer=tokenizers / f"{kind}-b", seed=SEED)
    assert new.config.vocab_size == len(theirs)
    before, after, fresh = read_all(old), read_all(new), a_new(new)
    rows = ours.get_vocab()
    carried = 0
    for token, id in theirs.get_vocab().items():
        carried += token in rows
        for table in WORDS & before.keys():
            expected = before[table][rows[token]] if token in rows else fresh[table][id].double()
            assert torch.equal(after[table][id], expected), token
    assert len(ours) * 0.5 < carried < len(theirs)
    dropped = len(rows.keys() - theirs.get_vocab().keys())
    assert f"{carried} of the {len(theirs)} tokens" in new.note
    assert f"{len(theirs) - carried} are new, {dropped} of the old ones are dropped" in new.note
    write_imported(new, tmp_path / "out")
    assert_identical(read_all(from_checkpoint(tmp_path / "out")), after)
    kept = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    assert kept.get_vocab() == theirs.get_vocab()


def test_another_kind_of_tokenizer(tokenizers: Path) -> None:
    """Roles by role, words by the text with the space before it, ids and positions of the padding token follow."""
    ours, theirs = (AutoTokenizer.from_pretrained(tokenizers / name) for name in ("wordpiece-a", "bpe-b"))
    noise = with_tokenizer(tokenizers / "wordpiece-a", bos_token_id=None, eos_token_id=None)
    old = dataclasses.replace(noise, read=lambda name: noise.read(name) + 0.5)  # the rows of padding too
    new = resized(old, tokenizer=tokenizers / "bpe-b", seed=SEED)
    config = new.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    before, after = (model.read("embeddings.words.weight") for model in (old, new))
    for role in ("pad", "cls", "sep", "mask", "unk"):
        here, there = (getattr(tokenizer, f"{role}_token_id") for tokenizer in (ours, theirs))
        assert torch.equal(after[there], before[here]), role
    words = [w for w in " ".join(TEXTS).replace(",", "").split() if w in ours.get_vocab()]
    pairs = [(theirs.encode(f" {word}", add_special_tokens=False), word) for word in words]
    whole = [(ids[0], word) for ids, word in pairs if len(ids) == 1]
    assert {"café", "state"} <= {word for _, word in whole}
    for id, word in whole:
        assert torch.equal(after[id], before[ours.get_vocab()[word]]), word
    assert torch.equal(after[theirs.convert_tokens_to_ids(",")], before[ours.convert_tokens_to_ids(",")])
    fresh = a_new(new)["embeddings.words.weight"].double()
    inner, beginning = theirs.convert_tokens_to_ids("t"), ours.convert_tokens_to_ids("t")
    assert "##t" not in ours.get_vocab() or not torch.equal(after[inner], before[beginning])
    assert torch.equal(after[theirs.convert_tokens_to_ids("Ā")], fresh[theirs.convert_tokens_to_ids("Ā")])

    assert config.longest_sequence == old.config.longest_sequence
    assert config.max_position_embeddings == old.config.max_position_embeddings + 1
    positions = old.read(POSITIONS), new.read(POSITIONS)
    assert torch.equal(positions[1][2:], positions[0][1:])
    assert torch.equal(positions[1][1], positions[0][0])
    assert "model.max_position_embeddings is 25 instead of 24: positions are counted from" in new.note


def test_the_text_of_a_token(tmp_path: Path) -> None:
    """A space where a word begins; what is no text of its own is told apart by a leading zero byte."""

    def texts(style: Any, *tokens: str, special: tuple[int, ...] = ()) -> dict[str, int]:
        ids = {token: id for id, token in enumerate(tokens)}
        return Tokens(ids, style, frozenset(special), {}).by_text()

    byte_level = texts("byte-level", "<s>", "Ġstate", "ing", "Ã©", "Ã", special=(0,))
    assert byte_level == {"<s>": 0, " state": 1, "ing": 2, "é": 3, "\0Ã": 4}
    assert texts("space mark", "<s>", "▁state", "ing", special=(0,)) == {"<s>": 0, " state": 1, "ing": 2}
    wordpiece = texts("wordpiece", "[MASK]", "state", "##ing", ",", "##,", special=(0,))
    assert wordpiece == {"[MASK]": 0, " state": 1, "ing": 2, ",": 3, "\0##,": 4}
    for kind, style in (("unigram", "space mark"), ("bpe", "byte-level"), ("wordpiece", "wordpiece")):
        train_tokenizer(kind, TEXTS * 9, tmp_path / kind, vocab_size=300 if kind == "bpe" else 50, progress=False)
        assert Tokens.read(tmp_path / kind).style == style


def test_the_own_tokenizer_changes_nothing(tokenizers: Path) -> None:
    folder = tokenizers / "bpe-a"
    size = Vocabulary.from_folder(folder).size
    old = with_tokenizer(folder, vocab_size=384)
    assert size < 384
    new = resized(old, tokenizer=folder, vocab_size=384)
    assert new.config == old.config
    assert_identical(read_all(new), read_all(old))


def test_rows_that_no_token_has_can_be_cut(tokenizers: Path) -> None:
    folder = tokenizers / "bpe-a"
    size = Vocabulary.from_folder(folder).size
    old = with_tokenizer(folder, vocab_size=384)
    alone = dataclasses.replace(old, tokenizer=None)
    cut = {name: value[:size] if name in WORDS else value for name, value in read_all(old).items()}
    for new in (
        resized(old, vocab_size=size),
        resized(old, tokenizer=folder),
        resized(alone, vocab_size=size, tokenizer=folder),
    ):
        assert new.config.vocab_size == size
        assert_identical(read_all(new), cut)
    assert "is taken for its own, so that all ids stay" in resized(alone, tokenizer=folder).note
    refused(lambda: resized(old, vocab_size=size - 1), f"which has {size} ids: set it to {size} or more, or give")
    refused(lambda: resized(alone, vocab_size=size), "no tokenizer files to say that no token has them: give its token")
    refused(lambda: resized(old, vocab_size=size - 1, tokenizer=folder), f"is smaller than the {size} ids of tokenizer")


def test_berts_own_file_names_tokens_too(tokenizers: Path, tmp_path: Path) -> None:
    """TensorFlow's folders have a vocab.txt alone."""
    theirs = AutoTokenizer.from_pretrained(tokenizers / "wordpiece-a")
    tokens = theirs.convert_ids_to_tokens(range(len(theirs)))
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    old = with_tokenizer(tokenizers / "wordpiece-a")
    expected = resized(old, tokenizer=tokenizers / "wordpiece-b")
    found = resized(dataclasses.replace(old, tokenizer=tmp_path), tokenizer=tokenizers / "wordpiece-b")
    assert_identical(read_all(found), read_all(expected))
    assert found.note == expected.note


# Positions.


def interpolated(table: np.ndarray, rows: int) -> np.ndarray:
    places = np.linspace(0, len(table) - 1, rows)
    return np.stack([np.interp(places, np.arange(len(table)), feature) for feature in table.T], axis=1)


@pytest.mark.parametrize("name", FRONT)
@pytest.mark.parametrize("method", ["linear", "tile"])
def test_longer_tables_of_positions(name: str, method: str) -> None:
    network = described(name).filled(Mesh.solo()).eval()
    old, front = imported(network), FRONT[name]
    longest = network.config.longest_sequence
    longer = 2 * longest + 7
    new = resized(old, positions=longer, method=method)
    assert new.config.longest_sequence == longer
    added = longer - longest
    assert new.config.max_position_embeddings == network.config.max_position_embeddings + added
    before, after = read_all(old), read_all(new)
    assert {POSITIONS} == {name for name in before if not torch.equal(before[name], after[name])}
    then, now = before[POSITIONS].numpy(), after[POSITIONS].numpy()
    assert np.array_equal(now[:front], then[:front])
    if method == "linear":
        assert np.array_equal(now[[front, -1]], then[[front, -1]])
        np.testing.assert_allclose(now[front:], interpolated(then[front:], longer), rtol=1e-12, atol=1e-14)
    else:
        for position in range(longer):
            assert np.array_equal(now[front + position], then[front + position % longest])
    model = LoadedModel(network_of(new))
    with torch.no_grad():
        assert model(torch.full((1, longer), 5)).logits.shape[1] == longer
    refused(lambda: model(torch.full((1, longer + 1), 5)), f"positions for {longer}")
    if method == "tile":  # short rows see what they saw
        batch = make_batch(network.config, "padding")
        assert_identical(outputs(model.network, batch), outputs(network, batch))


def test_one_position_is_all_there_is_to_take() -> None:
    old = imported(described("megatron", max_position_embeddings=1).filled(Mesh.solo()))
    for method in ("linear", "tile"):
        new = resized(old, positions=3, method=method)
        assert torch.equal(new.read(POSITIONS), old.read(POSITIONS).expand(3, -1))


@pytest.mark.parametrize("name", FRONT)
def test_shorter_tables_of_positions(name: str) -> None:
    network = described(name).filled(Mesh.solo()).eval()
    new = resized(imported(network), positions=LENGTH)
    assert torch.equal(new.read(POSITIONS), logical_values(network)[POSITIONS][: FRONT[name] + LENGTH])
    assert f"the first {LENGTH} of {network.config.longest_sequence} positions are kept" in new.note
    batch = make_batch(network.config, "document")
    assert_identical(outputs(network_of(new), batch), outputs(network, batch))


@pytest.mark.parametrize("positions", [19, 70])
@pytest.mark.parametrize("name", RELATIVE)
def test_distances_keep_their_meaning(name: str, positions: int) -> None:
    network = described(name).filled(Mesh.solo()).eval()
    old = imported(network)
    new = resized(old, positions=positions, method="linear")
    longest = network.config.longest_sequence
    assert new.config.longest_sequence == positions
    assert getattr(new.config, new.config.length_field) == positions
    before, after = read_all(old), read_all(new)
    tables = [name for name in before if name.endswith((".distances.weight", ".bias.table.weight"))]
    assert len(tables) == (6 if "cross" in name else 3)
    for table in tables:
        assert len(after[table]) == 2 * positions - 1
        for distance in range(1 - positions, positions):
            seen = max(1 - longest, min(distance, longest - 1))
            assert torch.equal(after[table][positions - 1 + distance], before[table][longest - 1 + seen]), distance
    if POSITIONS in before:  # nothing reads it
        kept = min(before[POSITIONS].shape[0], positions)
        assert torch.equal(after[POSITIONS][:kept], before[POSITIONS][:kept])
    assert tables == [name for name in before if name != POSITIONS and not torch.equal(before[name], after[name])]
    if "cross" in name:
        return
    model, batch = network_of(new), make_batch(network.config, "document")
    assert_identical(outputs(model, batch), outputs(network, batch))
    with torch.no_grad():
        assert LoadedModel(model)(torch.full((1, positions), 5)).logits.shape[1] == positions
    refused(lambda: LoadedModel(model)(torch.full((1, positions + 1), 5)), f"positions for {positions}")


@pytest.mark.parametrize("name", ["mega", "mega-chunks"])
def test_without_a_table_of_positions_only_the_field_changes(name: str) -> None:
    old = imported(described(name).filled(Mesh.solo()))
    new = resized(old, positions=70)
    assert new.config == old.config.model_copy(update={"max_positions": 70})
    assert_identical(read_all(new), read_all(old))
    assert new.note == "model.max_positions is 70 instead of 24: the model took rows of any length before, and does"


def test_what_cannot_be() -> None:
    old = imported(described("roberta").filled(Mesh.solo()))
    refused(lambda: resized(old, vocab_size=0), "vocab_size is 0: set it to 1 or more")
    refused(lambda: resized(old, positions=-1), "positions is -1: set it to 1 or more")
    refused(lambda: resized(old, positions=30, method="cubic"), "'cubic' is unknown: choose one of linear, tile")
    refused(lambda: resized(old, tokenizer=Path("/none")), "/none has no tokenizer.json")
    chunks = imported(described("mega-chunks", relative_positional_bias="simple").filled(Mesh.solo()))
    refused(lambda: resized(chunks, positions=3), "chunk_size 4 exceeds max_positions 3")


# Files.


def test_through_files_to_transformers(tmp_path: Path) -> None:
    import transformers

    from_huggingface(GOLDEN / "roberta-prelayernorm-mlm", tmp_path / "taken")
    new = resized(from_checkpoint(tmp_path / "taken"), vocab_size=160, positions=300, seed=SEED)
    write_imported(new, tmp_path / "resized")
    to_huggingface(tmp_path / "resized", tmp_path / "out")
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert (told["vocab_size"], told["max_position_embeddings"]) == (160, 302)
    ids = torch.randint(5, 160, (2, 300), generator=torch.Generator().manual_seed(0))
    kind = transformers.RobertaPreLayerNormForMaskedLM
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert_close(theirs.eval()(ids).logits, load(tmp_path / "resized")(ids).logits, "logits")


def test_an_export_says_what_its_source_left_to_the_default(tmp_path: Path) -> None:
    """The released default of this field is another than ours."""
    as_released = {"max_position_embeddings": 510, "inv_coeff_init_option": False, "padding_counts": True}
    old = imported(described("nystromformer", **as_released).filled(Mesh.solo()).float())
    fields = {name: value for name, value in old.config.model_dump().items() if name != "max_position_embeddings"}
    told = {"config": fields, "aliases": [], "constants": []}
    old = dataclasses.replace(old, huggingface=told)
    for positions in (510, 512):
        write_imported(resized(old, positions=positions), tmp_path / f"{positions}")
        to_huggingface(tmp_path / f"{positions}", tmp_path / f"hf-{positions}")
        assert load(tmp_path / f"hf-{positions}").config.max_position_embeddings == positions


def test_ids_in_the_source_s_config_follow(tokenizers: Path) -> None:
    old = with_tokenizer(tokenizers / "wordpiece-a")
    fields = old.config.model_dump() | {"sep_token_id": 3, "tokenizer_class": "BertTokenizer", "id2label": {"0": "a"}}
    old = dataclasses.replace(old, huggingface={"config": fields, "aliases": ["an alias"], "constants": []})
    new = resized(old, tokenizer=tokenizers / "bpe-b")
    expected = fields | new.config.model_dump() | {"sep_token_id": 2}
    del expected["tokenizer_class"]
    assert new.huggingface == {"config": expected, "aliases": ["an alias"], "constants": []}
    assert resized(old).huggingface == old.huggingface


# Runs that start from it.


def test_training_starts_from_what_was_resized(ranks: Any, prepared: Path, tmp_path: Path) -> None:
    description = Description("roberta-prelayernorm", MODEL | {"vocab_size": 270})
    model = resized(imported(description.filled(Mesh.solo())), tokenizer=prepared / "tokenizer", positions=50)
    write_imported(model, tmp_path / "resized")
    values = read_all(model)
    losses = {}
    for tensor in (1, 2):
        overrides = {"model": MODEL | {"max_position_embeddings": 52}, "parallel.tensor": tensor, "optimizer.lr": 1e-9}
        overrides |= {"data.sequence_length": 50, "checkpoint.initialize_from": str(tmp_path / "resized")}
        run = Run(tmp_path / f"run-{tensor}")
        started = settings(prepared, run.folder, 1, overrides | {"schedule.warmup_steps": 0})
        assert ranks.run(train_here, started, count=tensor) == [None] * tensor
        losses[tensor] = run.steps()[0]
        assert_all_close(run.weights(), values, "weights after a step of next to nothing")
    assert_close(losses[2], losses[1], "loss and gradient norm")


def test_what_does_not_fit_a_run_is_said(tokenizers: Path, tmp_path: Path) -> None:
    folder, own = tmp_path / "taken", tokenizers / "bpe-a"
    model = with_tokenizer(own)
    write_imported(model, folder)
    theirs = model.config

    def said(tokenizer: Path = own, **fields: Any) -> str | None:
        line = misfit(folder, theirs, theirs.model_copy(update=fields), tokenizer)
        assert line is None or "\n" not in line
        return line and line.replace(str(folder), "@").replace(str(tokenizers), "tokenizers")

    size = theirs.vocab_size
    assert said() is None
    assert said(hidden_dropout_prob=0.3) is None
    assert said(vocab_size=size + 4) == (
        f"@ has vocab_size {size}, model.vocab_size is {size + 4}: set it to {size}, or start from what `farspan "
        f"convert resize @ OUT --tokenizer tokenizers/bpe-a --vocab-size {size + 4}` makes of it"
    )
    assert said(max_position_embeddings=66) == (
        "@ has max_position_embeddings 24, model.max_position_embeddings is 66: set it to 24, or start from what "
        "`farspan convert resize @ OUT --positions 64` makes of it"
    )
    assert said(tokenizer=tokenizers / "wordpiece-a", vocab_size=size + 4) == (
        "@ has '<s>' as token 0, the data's tokenizer has '[PAD]': start from what `farspan convert resize @ OUT "
        "--tokenizer tokenizers/wordpiece-a` makes of it"
    )
    shutil.rmtree(folder / "tokenizer")
    assert said(pad_token_id=0) == (
        "@ has pad_token_id 1, the data's tokenizer 0: start from what `farspan convert resize @ OUT --tokenizer "
        "tokenizers/bpe-a` makes of it"
    )
    mega = described("mega-simple", chunk_size=16).config
    other = mega.model_copy(update={"chunk_size": 8})
    line = misfit(folder, mega, other, own)
    assert line is not None and line.endswith("is read from there: set it to 16")
    rotary = described("mega").config
    assert misfit(folder, rotary, rotary.model_copy(update={"max_positions": 99}), own) is None
