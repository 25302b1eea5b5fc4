"""The kinds of bad input in what Farspan reads: text, prepared data, tokenizers, checkpoints, Hugging Face folders;
``bad_input`` says how they are written."""

from __future__ import annotations

import fractions
import shutil
from typing import Any

import torch
from bad_input import EXPORT, IMPORT, NEW, NORM, OPTIMIZER, PREPARE, RESUME, STEP, WEIGHTS, Kind
from spoil import (
    both,
    copied,
    cut,
    edited,
    gone,
    in_manifest,
    nothing,
    overwritten,
    pickled,
    swapped_index,
    with_swapped_words,
    with_tensors,
    without_roles,
    written,
)

MANIFEST = "data/dataset.json"


def without_checksums(manifest: dict[str, Any]) -> None:
    """As older Farspans wrote it."""
    for split in manifest["splits"].values():
        del split["index_checksums"]
        for shard in split["shards"]:
            del shard["checksums"]


DATA = [
    Kind(
        "no such folder", gone("data"), NEW,
        "@/data is not a prepared dataset (it has no dataset.json): run `farspan prepare` to make one, or run it "
        "again if it was interrupted",
    ),
    Kind(
        "not finished", gone(MANIFEST), NEW,
        "@/data is not a prepared dataset (it has no dataset.json): run `farspan prepare` to make one, or run it again "
        "if it was interrupted",
    ),
    Kind(
        "a manifest that is cut", cut(MANIFEST), NEW, f"@/{MANIFEST} is damaged (not JSON: …): prepare the data again",
    ),
    Kind(
        "a manifest that is another thing", written(MANIFEST, "[]"), NEW,
        f"@/{MANIFEST} is damaged (it holds no JSON object): prepare the data again",
    ),
    Kind(
        "a manifest that lacks what is needed", edited(MANIFEST, lambda m: m["splits"]["train"].update(shards=[{}])),
        NEW, f"@/{MANIFEST} is damaged (split 'train' lacks documents, tokens or shards): prepare the data again",
    ),
    Kind(
        "a manifest of another version", edited(MANIFEST, lambda m: m.update(version=9)), NEW,
        f"@/{MANIFEST} has format 'farspan-tokens' version 9, this Farspan reads 'farspan-tokens' version 1: prepare "
        "the data again",
    ),
    Kind(
        "a shard that is cut", cut("data/train/00000.bin"), NEW,
        "shard @/data/train/00000.bin has … bytes, dataset.json says … bytes: prepare the data again",
    ),
    Kind(
        "a shard that is missing", gone("data/train/00000.bin"), NEW,
        "shard @/data/train/00000.bin is missing, dataset.json says … bytes: prepare the data again",
    ),
    Kind(
        "a shard with a byte that changed", overwritten("data/train/00000.bin", 0, b"\xff"), NEW,
        "shard @/data/train/00000.bin is damaged (block 0, bytes 0 to …, is not what was written): put a whole copy "
        "in its place, or prepare the data again", leaves=("new", "new/config.yaml", "new/metrics.jsonl"),
    ),
    Kind(
        "a token outside of the vocabulary, where there are no checksums", both(
            edited(MANIFEST, without_checksums), overwritten("data/train/00000.bin", 0, b"\xff\xfe" * 20_000),
        ),
        NEW,
        "shard @/data/train/00000.bin is damaged (its token 0 is 65279, dataset.json says that ids are below 300): "
        "prepare the data again", leaves=("new", "new/config.yaml", "new/metrics.jsonl", "new/spikes.jsonl"),
    ),
    Kind("an index that is cut", cut("data/train/index.npy"), NEW, "index @/data/train/index.npy cannot be read …"),
    Kind(
        "an index of other data", lambda p: shutil.copy(p / "data/validation/index.npy", p / "data/train/index.npy"),
        NEW, "index @/data/train/index.npy does not agree with dataset.json: prepare the data again",
    ),
    Kind(
        "an index that was changed", swapped_index, NEW,
        "index @/data/train/index.npy is damaged (it is not what was written): put a whole copy in its place, or …",
    ),
    Kind(
        "an index out of order, where there are no checksums",
        both(edited(MANIFEST, without_checksums), swapped_index), NEW,
        "index @/data/train/index.npy is damaged (no ascending int64 offsets): prepare the data again",
    ),
    Kind(
        "no split to evaluate on", edited(MANIFEST, lambda m: m["splits"].pop("validation") and None),
        f"{NEW} evaluation.interval=1 evaluation.rows=8", "@/data has no split 'validation': it has train",
    ),
    Kind(
        "less than a row", nothing, f"{NEW} model.max_position_embeddings=99999 data.sequence_length=99000",
        "split 'train' of @/data has … tokens, fewer than one row of sequence_length 99000: shorten the "
        "rows, or prepare more text",
    ),
]  # fmt: skip

INPUT = [
    Kind("no such input", nothing, f"{PREPARE} @/none.txt", "input @/none.txt is no file or folder: check the path …"),
    Kind("a pattern without files", nothing, f"{PREPARE} @/*.none", "input '@/*.none' matches no file"),
    Kind(
        "a folder of no dataset", nothing, f"{PREPARE} @/hf --format text",
        "input @/hf is a folder: name its files, as in '@/hf/*', or say --format dataset",
    ),
    Kind(
        "an empty file", written("a.txt", ""), f"{PREPARE} @/a.txt", "the input has no text: nothing was prepared in …",
    ),
    Kind("blank lines alone", written("a.txt", "\n \n"), f"{PREPARE} @/a.txt", "the input has no text: nothing was …"),
    Kind(
        "not UTF-8", written("a.txt", "good\n\ncafé\n".encode("latin-1")), f"{PREPARE} @/a.txt",
        "@/a.txt is not UTF-8 text at byte 9: convert it first",
    ),
    Kind(
        "binary", written("a.txt", bytes(range(256))), f"{PREPARE} @/a.txt",
        "@/a.txt is not UTF-8 text at byte 128: convert it first",
    ),
    Kind("compressed", written("a.txt.gz", b"\x1f\x8b"), f"{PREPARE} @/a.txt.gz", "input @/a.txt.gz is compressed: …"),
    Kind(
        "a broken line of JSON", written("a.jsonl", '{"text": "a"}\n{"text": "b\n'), f"{PREPARE} @/a.jsonl",
        "@/a.jsonl at byte 14 is not a line of JSON: …",
    ),
    Kind(
        "JSON without end", written("a.jsonl", '{"text": ' + "[" * 100_000), f"{PREPARE} @/a.jsonl",
        "@/a.jsonl at byte 0 is not a line of JSON: …",
    ),
    Kind(
        "JSON without the field", written("a.jsonl", '{"body": "a"}\n'), f"{PREPARE} @/a.jsonl",
        "@/a.jsonl at byte 0 has the fields body: name the one that holds the text with --text-field, not 'text'",
    ),
    Kind(
        "JSON with a number for text", written("a.jsonl", '{"text": 3}\n'), f"{PREPARE} @/a.jsonl",
        "field 'text' of @/a.jsonl at byte 0 holds int, not text: set --text-field",
    ),
    Kind(
        "no parquet", written("a.parquet", "text"), f"{PREPARE} @/a.parquet",
        "@/a.parquet cannot be read as parquet: …",
    ),
    Kind(
        "a folder with other things", nothing, "prepare @/run --input @/text.txt",
        "@/run exists and is not a dataset being prepared: choose another folder",
    ),
    Kind(
        "a finished dataset of other settings", nothing, "prepare @/data --input @/text.txt --vocab-size 300 --seed 7",
        "@/data was begun with other settings: … seed was 0, now 7. Use the same ones, or another folder",
    ),
    Kind(
        "a dataset begun with other settings", written("out/settings.json", '{"seed": 3}'), f"{PREPARE} @/text.txt",
        "@/out was begun with other settings: … seed was 3, now 0. Use the same ones, or another folder",
    ),
    Kind(
        "a dataset begun whose settings are cut", written("out/settings.json", '{"seed":'), f"{PREPARE} @/text.txt",
        "@/out/settings.json is damaged (not JSON: …): remove @/out and prepare the data again",
    ),
    Kind(
        "a share that is none", nothing, f"{PREPARE} @/text.txt --validation-fraction 1.5",
        "validation_fraction is 1.5: set it to 0 or more, and below 1",
    ),
    Kind("no process", nothing, f"{PREPARE} @/text.txt --processes 0", "processes is 0: set it to 1 or more"),
]  # fmt: skip

GIVEN = f"{PREPARE} @/text.txt --tokenizer @/given"
TOKENIZER = [
    Kind(
        "no such folder", nothing, GIVEN,
        "tokenizer @/given is no folder: give one with a tokenizer.json, or a name on the hub",
    ),
    Kind(
        "a folder of something else", nothing, f"{PREPARE} @/text.txt --tokenizer @/run",
        "tokenizer @/run has no tokenizer.json, and cannot be loaded by transformers either: …",
    ),
    Kind(
        "tokenizer.json that is cut", both(copied("data/tokenizer", "given"), cut("given/tokenizer.json")), GIVEN,
        "@/given/tokenizer.json cannot be read as a tokenizer (…): give one that is whole",
    ),
    Kind(
        "tokenizer_config.json that is cut",
        both(copied("data/tokenizer", "given"), cut("given/tokenizer_config.json")), GIVEN,
        "@/given/tokenizer_config.json is damaged (not JSON: …): put a whole one there",
    ),
    Kind(
        "no token that frames a document", both(
            copied("data/tokenizer", "given"),
            without_roles("cls_token", "sep_token", "bos_token", "eos_token", folder="given"),
        ),
        GIVEN, "tokenizer @/given names no cls, sep, bos or eos token to mark where documents begin and end: set "
        "cls_token and sep_token in its tokenizer_config.json",
    ),
    Kind(
        "too small a vocabulary", nothing, "prepare @/out --input @/text.txt --vocab-size 10",
        "vocab_size 10 is too small for a bpe tokenizer: set it to 261 or more",
    ),
    Kind(
        "given and trained", nothing, f"{GIVEN} --train-tokenizer bpe",
        "a tokenizer is either given or trained: drop --tokenizer or --train-tokenizer",
    ),
    Kind("a dataset's that is missing", gone("data/tokenizer"), NEW, "@/data/tokenizer has no tokenizer.json …"),
    Kind(
        "a dataset's that is cut", cut("data/tokenizer/tokenizer.json"), NEW,
        "@/data/tokenizer/tokenizer.json cannot be read as a tokenizer (…): give one that is whole",
    ),
    Kind(
        "no mask token for mlm", without_roles("mask_token"), NEW,
        "objective mlm needs a mask token and the tokenizer of @/data has none: name one in its "
        "tokenizer_config.json, or use the objective clm",
    ),
    Kind(
        "larger than the model's vocabulary", nothing, f"{NEW} model.vocab_size=200",
        "model.vocab_size 200 is smaller than the tokenizer's 300 in @/data: leave it out, or prepare the data with "
        "another tokenizer",
    ),
    Kind(
        "another padding token than the model's", nothing, f"{NEW} model.pad_token_id=2",
        "model.pad_token_id 2 is not the tokenizer's (1) in @/data: leave it out, or prepare …",
    ),
    Kind(
        "replaced after the data were prepared", edited("data/tokenizer/tokenizer.json", with_swapped_words), RESUME,
        "@/data/tokenizer is not the tokenizer that the tokens of @/data were made with: put that one back, or prepare "
        "the data again",
    ),
]  # fmt: skip

NONE_WHOLE = "@/run/checkpoints has no whole checkpoint, 1 damaged: "
ANEW = "; set another run_dir to start anew"


def without_a_shard(manifest: dict[str, Any]) -> None:
    manifest["tensors"]["final_norm.weight"]["shards"]["exp_avg"].clear()


CHECKPOINT = [
    Kind(
        "no such path", nothing, f"{RESUME} --resume @/none",
        "@/none has no checkpoint: give a run folder, its checkpoints folder or one step-… folder",
    ),
    Kind(
        "not to be resumed", nothing, f"{RESUME} --resume never",
        "@/run/checkpoints already has checkpoints: set another run_dir, or leave out --resume never",
    ),
    Kind(
        "a manifest that is cut", cut(f"{STEP}/manifest.json"), RESUME,
        f"{NONE_WHOLE}@/{STEP}/manifest.json is damaged (not JSON: …): take another checkpoint{ANEW}",
    ),
    Kind(
        "a manifest that was edited", edited(f"{STEP}/manifest.json", lambda m: m.update(step=3)), RESUME,
        f"{NONE_WHOLE}@/{STEP}/manifest.json is damaged (it is not what was written): take another checkpoint{ANEW}",
    ),
    Kind(
        "a manifest that lacks what is needed", in_manifest(STEP, lambda m: m.pop("step") and None), RESUME,
        f"{NONE_WHOLE}@/{STEP}/manifest.json is damaged: it says nothing of step; take another checkpoint{ANEW}",
    ),
    Kind(
        "a manifest that says nonsense", in_manifest(STEP, lambda m: m.update(layout=[1])), RESUME,
        f"{NONE_WHOLE}@/{STEP}/manifest.json is damaged: its layout is no mapping; take another checkpoint{ANEW}",
    ),
    Kind(
        "of a newer version", in_manifest(STEP, lambda m: m.update(version=3)), RESUME,
        f"{NONE_WHOLE}@/{STEP}/manifest.json is 'farspan-checkpoint' version 3; this Farspan reads "
        f"'farspan-checkpoint' version 2: take the Farspan that wrote it{ANEW}",
    ),
    Kind(
        "that is asked for and damaged", cut(WEIGHTS), f"{RESUME} --resume @/{STEP}",
        f"@/{WEIGHTS} is damaged (…): take another checkpoint",
    ),
    *(
        Kind(f"{what} {how}", harm(file), RESUME, f"{NONE_WHOLE}@/{file} is {said}{ANEW}")
        for what, file in (("weights", WEIGHTS), ("optimizer state", OPTIMIZER))
        for how, harm, said in (
            ("that are cut", cut, "damaged (it has … bytes, … were written): take another checkpoint"),
            ("that are missing", gone, "missing: the checkpoint is not whole, take another"),
            (
                "with another header", lambda name: overwritten(name, 20, b"\xff\0\xff"),
                "damaged (bytes 0 to … are not those that were written): take another checkpoint",
            ),
        )
    ),
    Kind(
        "weights of another shape",
        with_tensors(WEIGHTS, lambda t: t.update({"final_norm.weight": torch.ones(5)})), RESUME,
        f"{NONE_WHOLE}@/{WEIGHTS} is damaged (it has … bytes, … were written): take another checkpoint{ANEW}",
    ),
    Kind(
        "weights alone", in_manifest(STEP, lambda m: m.update(layout={})), RESUME,
        f"@/{STEP} has weights but no optimizer state: set checkpoint.initialize_from to start from it",
    ),
    Kind(
        "of other data", edited(MANIFEST, lambda m: m.update(made="again")), RESUME,
        f"@/{STEP} was trained on other data than @/data now holds: set another run_dir",
    ),
    Kind(
        "longer than the run", nothing, f"{RESUME} training.steps=1 schedule.warmup_steps=0",
        f"@/{STEP} is past training.steps 1: raise it, or set another run_dir",
    ),
    Kind(
        "no weights to start from", nothing, f"{NEW} checkpoint.initialize_from=@/none",
        "@/none has no checkpoint: give a run folder, its checkpoints folder or one step-… folder",
    ),
    Kind(
        "weights of another architecture to start from", nothing,
        f"{NEW} checkpoint.initialize_from=@/run model.model_type=megatron-bert",
        f"checkpoint.initialize_from @/{STEP} is of model_type 'roberta-prelayernorm', model.model_type is "
        "'megatron-bert': set one to fit the other",
    ),
    Kind(
        "optimizer state that is not whole", in_manifest(STEP, without_a_shard), RESUME,
        f"{NONE_WHOLE}@/{STEP}/manifest.json is damaged: it does not say where 'final_norm.weight' lies; take another "
        f"checkpoint{ANEW}",
    ),
    Kind(
        "a run without a checkpoint of another configuration", gone("run/checkpoints"), f"{RESUME} training.seed=7",
        "@/run holds a run with training.seed 1234, now it is 7: set another run_dir, or remove this one",
    ),
    Kind(
        "weights of another model to start from", nothing,
        f"{NEW} checkpoint.initialize_from=@/run model.hidden_size=64",
        f"embeddings.words.weight in @/{STEP} has shape (300, 32), the model needs (300, 64): the checkpoint is of "
        "another model configuration",
    ),
    *(
        Kind(
            f"a run with another {key}", nothing, f"{RESUME} {key}={value}",
            f"@/{STEP} was saved with {key} {old}, now it is {new}: set it back, or set another run_dir",
        )
        for key, value, old, new in (
            ("model.model_type", "megatron-bert", "'roberta-prelayernorm'", "'megatron-bert'"),
            ("model.num_hidden_layers", "2", "4", "2"),
            ("objective.probability", "0.3", "0.15", "0.3"),
            ("data.sequence_length", "16", "32", "16"),
            ("data.rows", "padded", "'packed'", "'padded'"),
            ("training.seed", "7", "1234", "7"),
            ("training.global_batch_size", "4", "8", "4"),
            ("training.dtype", "bfloat16", "'float32'", "'bfloat16'"),
        )
    ),
]  # fmt: skip

CONVERSION = [
    Kind(
        "an export into a folder with things", nothing, "convert to-hf @/run @/data",
        "@/data exists and is not empty: give a new folder, nothing is overwritten",
    ),
    Kind(
        "an export below a file", nothing, "convert to-hf @/run @/run.yaml/out",
        "@/run.yaml: File exists (something else stands in its place, give another path)",
    ),
    Kind(
        "an export of nothing", nothing, "convert to-hf @/data @/out", "@/data has no checkpoint: give a run folder, …",
    ),
    Kind(
        "an export in an unknown dtype", nothing, f"{EXPORT} --dtype int8",
        "dtype 'int8' is unknown: choose one of float32, bfloat16, float16",
    ),
    Kind("an export of cut weights", cut(WEIGHTS), EXPORT, f"@/{WEIGHTS} is damaged (…): take another checkpoint"),
    Kind(
        "an export of an unknown architecture",
        in_manifest(STEP, lambda m: m["model"].update(model_type="gpt")), EXPORT,
        f"@/{STEP}/manifest.json: model_type 'gpt' is unknown: choose one of …roberta-prelayernorm…",
    ),
    Kind(
        "an export of unknown heads", in_manifest(STEP, lambda m: m.update(heads=["lm", "x"])), EXPORT,
        f"@/{STEP}/manifest.json: roberta-prelayernorm has no head 'x', only lm",
    ),
    Kind(
        "an export of other sizes", in_manifest(STEP, lambda m: m["model"].update(hidden_size=64)), EXPORT,
        f"embeddings.words.weight in @/{STEP} has shape (300, 32), the model needs (300, 64): the checkpoint is of "
        "another model configuration",
    ),
    Kind(
        "an import into a folder with things", nothing, "convert from-hf @/hf @/run",
        "@/run exists and is not empty: give a new folder, nothing is overwritten",
    ),
    Kind(
        "an import of no model folder", nothing, "convert from-hf @/data @/out",
        "@/data/config.json is missing: @/data is not a Hugging Face model folder, or not a whole one",
    ),
    Kind(
        "an import of a file", nothing, "convert from-hf @/run.yaml @/out",
        "@/run.yaml/config.json is missing: @/run.yaml is not a Hugging Face model folder, or not a whole one",
    ),
    Kind(
        "an import of an unsupported architecture", edited("hf/config.json", lambda c: c.update(model_type="bert")),
        IMPORT, "@/hf/config.json: model_type 'bert' is unknown: choose one of …roberta-prelayernorm…",
    ),
    Kind(
        "an import of a cut config.json", cut("hf/config.json"), IMPORT,
        "@/hf/config.json is damaged (not JSON: …): put a whole one there",
    ),
    Kind(
        "an import of cut weights", cut("hf/model.safetensors"), IMPORT,
        "@/hf/model.safetensors is damaged (…): copy it again",
    ),
    Kind(
        "an import without weights", gone("hf/model.safetensors"), IMPORT,
        "@/hf has no weights: model.safetensors or pytorch_model.bin is needed",
    ),
    Kind(
        "an import without a tensor", with_tensors("hf/model.safetensors", lambda t: t.pop(NORM)), IMPORT,
        f"@/hf lacks tensors of a roberta-prelayernorm model of this config.json, such as {NORM}",
    ),
    Kind(
        "an import with a tensor of another shape",
        with_tensors("hf/model.safetensors", lambda t: t.update({NORM: torch.ones(5)})), IMPORT,
        f"{NORM} in @/hf has shape (5,), its config.json makes it (32,): give the config.json that belongs to "
        "the weights",
    ),
    Kind(
        "an import with a tensor too many",
        with_tensors("hf/model.safetensors", lambda t: t.update(new=torch.ones(5))), IMPORT,
        "@/hf has 1 tensors that this config.json does not account for, such as new: importing would drop them",
    ),
    Kind(
        "an import of quantized weights",
        with_tensors("hf/model.safetensors", lambda t: t.update({NORM: t[NORM].char()})), IMPORT,
        f"{NORM} in @/hf/model.safetensors is of type I8: give weights in floating point, not quantized ones",
    ),
    Kind(
        "an import of a pickle of more than tensors", pickled({"a": fractions.Fraction(1, 2)}), IMPORT,
        "@/hf/pytorch_model.bin cannot be read as tensors alone (it is damaged, or holds more than tensors): "
        "save it as safetensors",
    ),
    Kind(
        "an import of a pickle of something else", pickled([1, 2]), IMPORT,
        "@/hf/pytorch_model.bin cannot be read as tensors alone (it is no dictionary of tensors): save it as "
        "safetensors",
    ),
]  # fmt: skip
