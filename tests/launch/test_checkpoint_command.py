"""``farspan checkpoint ls | verify | diff``, on a run of a tiny model under two layouts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkpoints import content, edit, held, opened, write_checkpoint
from models import Description
from safetensors.torch import load_file, save_file

import farspan
from farspan.launch.checkpoint_listing import Listed, reasons_to_keep
from farspan.launch.cli import main
from farspan.parallel.mesh import Mesh
from farspan.parallel.sharding import logical_of
from farspan.pretrain.checkpoint import Manifest, Retention, find
from farspan.pretrain.checkpoint.tensor_file import copy_checked
from farspan.pretrain.config import CheckpointConfig
from farspan.pretrain.config_file import parse_config
from farspan.pretrain.conversion.to_huggingface import to_huggingface

MODEL = Description("megatron-bert", {"num_hidden_layers": 2})
NETWORK = MODEL.filled(Mesh.solo())
LOGICAL = {name: logical_of(p) for name, p in NETWORK.named_parameters()}
WEIGHTS = {name: logical_of(p).merge([p.detach()]) for name, p in NETWORK.named_parameters()}
LOSSES = {2: 3.5, 4: 1.25, 6: 2.5, 8: 2.75}  # step → validation loss


def config(run_dir, **checkpoint):
    return parse_config(
        {
            "run_dir": str(run_dir),
            "model": MODEL.config.model_dump(),
            "data": {"folder": "data/mine", "sequence_length": 16},
            "training": {"steps": 8, "global_batch_size": 8, "micro_batch_size": 8},
            "evaluation": {"interval": 2},
            "checkpoint": {"interval": 2, **checkpoint},
        },
        "a test",
    )


def save(run, step, layout=(1, 1), shift=0.0, **checkpoint):
    """A checkpoint as so many tensor ranks and ZeRO partitions would leave it."""
    tensor, data = layout
    state = {"weight": WEIGHTS} | {
        kind: {name: value * factor + step + shift for name, value in WEIGHTS.items()}
        for kind, factor in (("exp_avg", 0.1), ("exp_avg_sq", 0.01))
    }
    folder = run / "checkpoints" / f"step-{step:08d}"
    parts = lambda name: held(sharded(name, tensor), tensor, data)  # noqa: E731
    write_checkpoint(folder, state, parts)
    tokenizer = run / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    dataclasses.replace(
        Manifest.read(folder),
        step=step,
        model=MODEL.config.model_dump(),
        heads=MODEL.heads,
        layout={"tensor": tensor, "pipeline": 1, "virtual_stages": 1, "data": data, "zero_stage": 3 * (data > 1)},
        trainer={"data": "5" * 64, "loss_scale": {"value": 1.0, "finite_steps": step}},
        metrics={"loss": 4.0 - step / 8, "validation_loss": LOSSES[step]},
        config=config(run, **checkpoint).model_dump() | {"parallel": {"tensor": tensor, "zero_stage": 3}},
        written_by={"version": "0.1.0", "commit": "abc1234"},
        tokenizer=copy_checked(tokenizer.iterdir(), folder / "tokenizer"),
    ).write(folder)
    (run / "checkpoints" / "latest").write_text(f"{folder.name}\n")
    return folder


def sharded(name, tensor):
    """The logical tensor on so many ranks, which pad the vocabulary."""
    logical = LOGICAL[name]
    size = None if logical.dim is None else logical.shape[logical.dim]
    return logical if size is None or size % tensor == 0 else dataclasses.replace(logical, padded=-(-size // 128) * 128)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "mine"
    for step, layout in ((2, (1, 1)), (4, (2, 1)), (6, (1, 3)), (8, (2, 2))):
        save(run, step, layout)
    return run


@pytest.fixture
def run(run_folder, tmp_path):
    """One to spoil."""
    return Path(shutil.copytree(run_folder, tmp_path / "mine"))


@pytest.fixture
def say(capsys):
    def say(*arguments):
        capsys.readouterr()
        try:
            code = main(["checkpoint", *map(str, arguments)])
        except SystemExit as end:
            code = int(str(end.code))
        said = capsys.readouterr()
        lines = said.out.splitlines()
        assert all(len(line) <= 100 for line in lines if "/" not in line and "damaged" not in line), lines
        return code, lines, said.err

    return say


def flip(path, at=-1):
    whole = bytearray(path.read_bytes())
    whole[at] ^= 64
    path.write_bytes(whole)


# ls


def test_ls_of_a_run(say, run_folder):
    for given in (run_folder, run_folder / "checkpoints"):
        code, lines, _ = say("ls", given)
        assert code == 0 and lines[0] == str(run_folder / "checkpoints")
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines[2:6]]
        assert [row[0] for row in rows] == ["2", "4", "6", "8"]
        for row, step in zip(rows, LOSSES, strict=True):
            folder = run_folder / "checkpoints" / f"step-{step:08d}"
            stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            assert row[1] == f"{stored / 1000:.1f} kB"
            assert row[3:6] == [f"{4 - step / 8:.4f}", f"{LOSSES[step]:.4f}", f"{step * 8}"]
        assert [row[2] for row in rows] == ["1 rank", "TP2", "DP3, ZeRO 3", "TP2×DP2, ZeRO 3"]
        assert [row[6:] for row in rows] == [[], [], ["last"], ["latest, last"]]
        assert lines[6] == "kept as last: the newest 2"


def test_ls_says_what_is_kept_as_the_run_is_configured_now(say, run):
    edit(run / "checkpoints/step-00000008", lambda m: m["config"]["checkpoint"].update(keep_last=0))
    assert say("ls", run)[1][-1] == "all are kept"
    settings = config(run, keep_last=1, keep_every=4, keep_best=2).model_dump()
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    _, lines, _ = say("ls", run)
    ends = [re.split(r"\s{2,}", line.strip())[6:] for line in lines[2:6]]
    assert ends == [[], ["every, best"], ["best"], ["latest, last, every"]]
    assert (
        lines[-1] == "kept as last: the newest 1; every: a step that divides by 4; best: the 2 lowest validation losses"
    )


@pytest.mark.parametrize("seed", range(20))
def test_reasons_are_those_of_the_retention(seed, run_folder):
    generator = np.random.default_rng(seed)
    last, every, best, reach = (int(generator.integers(low, 5)) for low in (1, 0, 0, 0))
    listed = [Listed.read(path) for path in sorted((run_folder / "checkpoints").glob("step-*"))]
    settings = CheckpointConfig(keep_last=last, keep_every=every, keep_best=best)
    why = reasons_to_keep(listed, settings, find(run_folder), reach)
    forgotten = Retention(last, every, best, reach).forgotten([one.folder for one in listed])
    assert [folder for folder, reasons in why.items() if not reasons] == forgotten


def test_ls_of_what_is_not_whole(say, run):
    root = run / "checkpoints"
    (root / "step-00000002/manifest.json").unlink()
    flip(root / "step-00000004/manifest.json", 300)
    (root / "latest").write_text("step-00000006\n")
    (root / ".step-00000010.tmp").mkdir()
    (root / ".step-00000010.tmp/weights-00000.safetensors").write_bytes(b"x" * 1234)
    code, lines, _ = say("ls", run)
    assert code == 0
    assert lines[2].split(None, 1) == ["2", "no manifest"]
    assert lines[3].split(None, 1)[0] == "4" and lines[3].split(None, 1)[1].startswith("manifest.json is damaged")
    assert lines[4].endswith("latest, last") and lines[5].endswith("after the latest")
    assert lines[-1] == ".step-00000010.tmp: 1.2 kB, being written now or left by a save that was interrupted"
    shutil.rmtree(root / "step-00000002")
    for path in root.glob("step-*"):
        shutil.rmtree(path)
    code, lines, _ = say("ls", run)
    assert code == 0 and lines == [str(root), lines[-1]] and lines[-1].startswith(".step-00000010.tmp")
    code, _, err = say("verify", run)
    assert code == 2 and "has no checkpoint, only what an interrupted save has left" in err


def test_ls_as_json(say, run):
    (run / "checkpoints/step-00000002/manifest.json").unlink()
    said = json.loads("\n".join(say("ls", run, "--json")[1]))
    assert [one["folder"] for one in said["checkpoints"]] == [f"step-{step:08d}" for step in LOSSES]
    assert said["checkpoints"][0]["problem"] == "no manifest" and said["leftovers"] == []
    newest = said["checkpoints"][-1]
    assert (newest["step"], newest["rows"], newest["latest"], newest["kept"]) == (8, 64, True, ["last"])
    assert newest["layout"]["tensor"] == 2 and newest["metrics"]["validation_loss"] == LOSSES[8]
    one = json.loads("\n".join(say("ls", run / "checkpoints/step-00000008", "--json")[1]))
    assert {name: tuple(entry["shape"]) for name, entry in one["tensors"].items()} == {
        name: tuple(value.shape) for name, value in WEIGHTS.items()
    }
    assert one["tensors"]["embeddings.words.weight"]["kinds"]["exp_avg"] == {"dtype": "float32", "shards": 4}


def test_ls_of_a_checkpoint(say, run_folder):
    folder = run_folder / "checkpoints/step-00000008"
    code, lines, _ = say("ls", folder)
    assert code == 0
    assert "step 8, loss 3.0000, validation loss 2.7500, 64 rows" in lines
    assert "megatron-bert, heads lm, nsp, saved with TP2×DP2, ZeRO 3" in lines
    parameters = sum(value.numel() for value in WEIGHTS.values())
    stored = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).items()]
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        of_kind = [key for key, _ in stored if (key.partition(":")[0] if ":" in key else "weight") == kind]
        row = re.split(r"\s{2,}", next(line for line in lines if line.startswith(f"{kind}  ")))
        assert row[1:] == ["float32", f"{len(WEIGHTS)}", f"{parameters:,}", f"{parameters * 4 / 1e3:.1f} kB",
                           f"{len(of_kind)}"]  # fmt: skip
    parts = [re.split(r"\s{2,}", line) for line in lines[lines.index("") + 6 :]]
    assert "layers.0 to 1" in [row[0] for row in parts]
    assert sum(int(row[2].replace(",", "")) for row in parts[1:]) == parameters
    assert sum(int(row[4]) for row in parts[1:]) == len(stored)


def test_ls_of_every_tensor(say, run_folder):
    _, lines, _ = say("ls", run_folder / "checkpoints/step-00000004", "--tensors")
    at = lines.index("shards of each tensor") + 1
    assert lines[at].split() == ["tensor", "shape", "dtype", "updates", "weight", "exp_avg", "exp_avg_sq"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[at + 1 :]}
    assert rows.keys() == WEIGHTS.keys()
    assert rows["embeddings.words.weight"] == ["129×32", "float32", "3", "2", "2", "2"]
    assert rows["final_norm.bias"] == ["32", "float32", "3", "1", "1", "1"]


def test_ls_opens_manifests_alone(say, run_folder):
    with opened() as paths:
        say("ls", run_folder)
        say("ls", run_folder / "checkpoints/step-00000008")
    assert [path for path in paths if path.endswith("manifest.json")]
    assert not [path for path in paths if path.endswith(".safetensors")]


# verify


def test_verify_of_whole_ones(say, run_folder):
    assert say("verify", run_folder)[:2] == (0, [said_of_whole(run_folder, 8)])
    code, lines, _ = say("verify", run_folder / "checkpoints", "--all", "--jobs", "3")
    assert (code, lines) == (0, [said_of_whole(run_folder, step) for step in LOSSES])
    assert say("verify", run_folder / "checkpoints/step-00000004")[1] == [said_of_whole(run_folder, 4)]


def said_of_whole(run, step):
    files = list((run / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    stored = sum(path.stat().st_size for path in files) / 1000
    return f"step-{step:08d}: whole ({stored:.1f} kB in {len(files)} files, {len(WEIGHTS)} tensors)"


@pytest.mark.parametrize("place", [0, 0.001, 0.3, 0.7, 0.999])
@pytest.mark.parametrize(
    "file", ["weights-00001.safetensors", "optimizer-00000.safetensors", "tokenizer/tokenizer.json"]
)
def test_verify_finds_a_byte(file, place, say, run):
    path = run / "checkpoints/step-00000004" / file
    flip(path, int(place * path.stat().st_size))
    code, lines, _ = say("verify", run, "--all")
    assert code == 1 and [line.split(": ")[1] for line in lines if "whole" not in line] == ["damaged"]
    assert f"step-00000004: damaged: {file.partition('/')[2] or file} is damaged (bytes 0 to" in lines[1] or (
        f"step-00000004: damaged: {file} is damaged (bytes 0 to" in lines[1]
    )
    assert "take another" not in lines[1]


def test_verify_of_missing_cut_and_foreign_files(say, run):
    root = run / "checkpoints"
    (root / "step-00000002/optimizer-00000.safetensors").unlink()
    cut = root / "step-00000004/weights-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    (root / "step-00000006/notes.txt").write_text("mine")
    (root / "step-00000008/manifest.json").unlink()
    code, lines, _ = say("verify", run, "--all")
    assert code == 1
    assert lines[0].startswith("step-00000002: damaged: optimizer-00000.safetensors is missing")
    assert lines[1].startswith("step-00000004: damaged: weights-00001.safetensors is damaged (it has ")
    assert lines[2].endswith("; not part of it: notes.txt") and "whole" in lines[2]
    assert lines[3].startswith("step-00000008: damaged: manifest.json is missing")
    assert say("verify", run / "checkpoints/step-00000006")[0] == 0
    assert say("verify", run)[0] == 1  # what a resume tries first


def test_verify_compares_with_the_model(say, run):
    folder = run / "checkpoints/step-00000008"
    edit(folder, lambda m: m["tensors"]["final_norm.bias"]["shards"]["exp_avg"].pop())
    assert "it does not say where 'final_norm.bias' lies" in say("verify", run)[1][0]
    edit(folder, lambda m: m["tensors"].pop("final_norm.bias") and None)
    code, lines, _ = say("verify", run)
    assert code == 1 and "final_norm.bias is missing" in lines[0]
    edit(folder, lambda m: m["model"].update(model_type="soup"))
    assert "manifest.json: model_type 'soup' is unknown" in say("verify", run)[1][0]


# diff


def test_diff_of_the_same(say, run_folder, tmp_path):
    other = tmp_path / "other"
    save(other, 8, (1, 1))
    code, lines, _ = say("diff", run_folder, other)
    assert code == 0 and lines[-1] == f"the same to the bit: {3 * len(WEIGHTS)} tensors"
    facts = {re.split(r"\s{2,}", line)[0]: re.split(r"\s{2,}", line)[1:] for line in lines[2:] if "  " in line}
    assert facts["saved with"] == ["TP2×DP2, ZeRO 3", "1 rank"] and facts["step"] == ["8", "the same"]
    assert facts["parallel.tensor"] == ["2", "1"] and "model.hidden_size" not in facts
    assert len(facts["run_dir"]) == 2 and facts["data"] == ["5" * 16, "the same"]
    assert f"weight: {len(WEIGHTS)} tensors, all bit-equal" in lines


def test_diff_says_where_and_how_much(say, run_folder, tmp_path):
    other = tmp_path / "other"
    folder = save(other, 8, (1, 1), shift=0.25)
    code, lines, _ = say("diff", run_folder, other)
    assert code == 1 and lines[-1].startswith(f"not the same: {2 * len(WEIGHTS)} of {3 * len(WEIGHTS)} tensors")
    assert say("diff", run_folder, other, "--weights-only")[0] == 0
    ours = {name: value * 0.1 + 8 for name, value in WEIGHTS.items()}
    theirs = {key.partition(":")[2]: value for key, value in load_file(folder / "optimizer-00000.safetensors").items()
              if key.startswith("exp_avg:")}  # fmt: skip
    relative = {
        name: (ours[name].view(-1) - theirs[name].view(-1)).double().abs().max()
        / max(ours[name].abs().max(), theirs[name].abs().max())
        for name in WEIGHTS
    }
    largest = max(relative, key=lambda name: relative[name])
    at = lines.index(next(line for line in lines if line.startswith("exp_avg: ")))
    assert lines[at] == (
        f"exp_avg: {len(WEIGHTS)} tensors, 0 bit-equal; {sum(v.numel() for v in WEIGHTS.values()):,} of "
        f"{sum(v.numel() for v in WEIGHTS.values()):,} values differ"
    )
    assert float(lines[at + 1].split()[3]) == pytest.approx(float(relative[largest]), rel=1e-2)
    assert float(lines[at + 2].split()[3]) == pytest.approx(0.25, rel=1e-2)
    code, lines, _ = say("diff", run_folder, other, "--tolerance", "0.04")
    assert code == 0 and lines[-1].startswith("the same within 0.04")
    assert say("diff", run_folder, other, "--tolerance", "0.02")[0] == 1


def test_diff_of_what_one_alone_has(say, run):
    root = run / "checkpoints"

    def change(manifest):
        for entry in manifest["tensors"].values():
            del entry["shards"]["exp_avg"], entry["dtypes"]["exp_avg"]
        manifest["tensors"]["final_norm.bias"]["step"] = 1

    edit(root / "step-00000002", change)
    code, lines, _ = say("diff", root / "step-00000004", root / "step-00000002", "--tolerance", "9")
    assert code == 1 and lines[-1].endswith("; see above")
    assert f"only in A: exp_avg of {sorted_first(root)} and {len(WEIGHTS) - 1} more" in lines
    assert "updates: 3 in A, 1 in B, of final_norm.bias" in lines
    assert say("diff", root / "step-00000004", root / "step-00000002", "--weights-only")[0] == 0


def sorted_first(root):
    return next(iter(Manifest.read(root / "step-00000004").tensors))


def test_diff_with_a_hugging_face_folder(say, run_folder, tmp_path):
    to_huggingface(run_folder / "checkpoints/step-00000004", tmp_path / "hf")
    code, lines, _ = say("diff", run_folder, tmp_path / "hf", "--weights-only")
    assert code == 0 and lines[-1] == f"the same to the bit: {len(WEIGHTS)} tensors"
    assert "model's configuration: the same" in lines or any(line.startswith("model.") for line in lines)
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["bert.encoder.ln.bias"][3] += 1
    save_file(
        {name: value.clone() for name, value in weights.items()}, tmp_path / "hf/model.safetensors", {"format": "pt"}
    )
    code, lines, _ = say("diff", run_folder, tmp_path / "hf", "--weights-only")
    assert code == 1 and any("absolute difference 1 in final_norm.bias" in line for line in lines), lines
    assert say("diff", run_folder, tmp_path / "hf")[0] == 1  # the optimizer's state is in one alone


def test_diff_of_a_damaged_one(say, run):
    flip(run / "checkpoints/step-00000004/weights-00000.safetensors")
    code, _, err = say("diff", run, run / "checkpoints/step-00000004")
    assert code == 2 and "weights-00000.safetensors is damaged" in err and err.count("\n") == 1


def test_nothing_is_changed(say, run):
    before = content(run)
    for arguments in (["ls", run], ["verify", run, "--all"], ["diff", run, run]):
        say(*arguments)
    assert content(run) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ls", "nowhere"], "nowhere has no checkpoint: give a run folder"),
        (["verify", "nowhere"], "nowhere has no checkpoint: give a run folder"),
        (["diff", "nowhere", "nowhere"], "nowhere has no checkpoint: give a run folder"),
        (["verify", "nowhere", "--jobs", "0"], "'0' is not a number from 1 up"),
        (["diff", "a", "b", "--tolerance", "-1"], "'-1' is not a number from 0 up"),
        (["diff", "a", "b", "--tolerance", "nan"], "'nan' is not a number from 0 up"),
        (["diff", "a"], "the following arguments are required: B"),
        (["soup"], "invalid choice: 'soup'"),
    ],
)
def test_bad_arguments(arguments, words, say):
    code, _, err = say(*arguments)
    assert code == 2 and words in err


def test_tensors_is_of_one_checkpoint(say, run_folder):
    code, _, err = say("ls", run_folder, "--tensors")
    assert code == 2 and "--tensors is of one checkpoint" in err and err.count("\n") == 1


@pytest.mark.parametrize("step", LOSSES)
def test_the_page_shows_how_a_tensor_is_read(step, run_folder):
    page = (Path(farspan.__file__).parent / "docs/checkpoints.md").read_text()
    read, verify = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    folder = run_folder / f"checkpoints/step-{step:08d}"
    for name in WEIGHTS:
        known = {}
        given = read.replace("runs/mine/checkpoints/step-00001000", str(folder))
        exec(given.replace("layers.0.attention.qkv.weight", name), known)
        assert np.array_equal(known["tensor"], (WEIGHTS[name] * 0.1 + step).numpy())
    exec(verify, known)


def test_a_reader_that_has_enough(run_folder, monkeypatch):
    unread, written = os.pipe()
    os.close(unread)
    with os.fdopen(written, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["checkpoint", "ls", str(run_folder)]) == 141
