"""The commands and scripts that ``farspan launch`` builds, without starting them."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import settings

from farspan.launch.cli import main
from farspan.launch.launchers import deepspeed, slurm, torchrun
from farspan.launch.launchers.deepspeed import Follower, read_hostfile
from farspan.launch.launchers.slurm import TEMPLATE, time_seconds
from farspan.launch.launchers.torchrun import Nodes, endpoint


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path / "data", tmp_path / "a run", 10, {"parallel.data": 4})))
    return path


def dry_run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["launch", str(words[0]), "--dry-run", *map(str, words[1:])]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["launch", str(words[0]), "--dry-run", *map(str, words[1:])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("farspan: ") and error.count("\n") == 1
    return error


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


# torchrun.


def test_the_line_of_torchrun(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--nodes", "2", "--node-rank", "1", "--rendezvous", "127.0.0.1:4000", "--local-address", "10.0.0.2"]
    words = shlex.split(dry_run(capsys, "torchrun", *place, config, "optimizer.lr=1e-4"))
    from torch.distributed.run import get_args_parser

    torchruns = get_args_parser().parse_args(words[words.index("torch.distributed.run") + 1 :])
    assert (torchruns.nnodes, torchruns.nproc_per_node, torchruns.max_restarts) == ("2", "2", 3)
    assert (torchruns.rdzv_backend, torchruns.rdzv_endpoint, torchruns.rdzv_id) == ("c10d", "127.0.0.1:4000", "a-run")
    assert torchruns.rdzv_conf == "is_host=false" and torchruns.local_addr == "10.0.0.2" and torchruns.no_python
    assert Path(torchruns.log_dir).parent == tmp_path / "a run/logs"
    assert torchruns.training_script == sys.executable
    assert torchruns.training_script_args[-3:] == ["train", str(config), "optimizer.lr=1e-4"]


def test_other_places_of_torchrun(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(dry_run(capsys, "torchrun", config))
    assert option(words, "--nproc-per-node") == "4" and option(words, "--local-addr") == "127.0.0.1"
    assert option(words, "--rdzv-conf") == "is_host=true"
    more = ["--nodes", "1:2", "--ranks-per-node", "2", "--rendezvous", "[::1]:4000", "--max-restarts", "1"]
    assert "2 ranks do not make" in refused(capsys, "torchrun", *more, config)  # one node of the two
    more += ["--rendezvous-option", "timeout=5", config, "parallel.data=null"]
    words = shlex.split(dry_run(capsys, "torchrun", *more))
    assert option(words, "--rdzv-endpoint") == "[::1]:4000" and option(words, "--nnodes") == "1:2"
    assert option(words, "--rdzv-conf") == "is_host=true,timeout=5" and option(words, "--max-restarts") == "1"


def test_what_torchrun_is_not_asked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --rendezvous HOST:PORT" in refused(capsys, "torchrun", "--nodes", "2", config)
    assert "is not among --nodes 1" in refused(capsys, "torchrun", "--node-rank", "1", config)
    meet = ["--rendezvous", "x:1"]
    assert "do not divide among 3 nodes" in refused(capsys, "torchrun", "--nodes", "3", *meet, config)
    assert "start 4 ranks" in refused(capsys, "torchrun", "--ranks-per-node", "3", config)
    for text in ("0", "2:1", "x", "1:2:3"):
        with pytest.raises(argparse.ArgumentTypeError, match="not a number of nodes"):
            Nodes.parse(text)
    for text in ("host", "host:0", ":5", "host:70000"):
        with pytest.raises(argparse.ArgumentTypeError, match="HOST:PORT"):
            endpoint(text)


# DeepSpeed's launcher.


def test_the_line_of_deepspeed(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two nodes\na slots=2\n\nb slots=2\n")
    more = ["--ssh-port", "2222", "--deepspeed", "launcher=openmpi"]
    words = shlex.split(dry_run(capsys, "deepspeed", "--hostfile", hosts, *more, config))
    assert words[:4] == [sys.executable, "-P", "-m", "deepspeed.launcher.runner"]
    assert {f"--hostfile={hosts}", "--master_addr=a", "--master_port=29500", "--ssh_port=2222"} <= set(words)
    assert {"--launcher=openmpi", "--no_python", "--no_local_rank"} <= set(words) and "--no_ssh" not in words
    assert words[words.index("env") + 1].startswith(f"FARSPAN_ENDINGS={tmp_path / 'a run/logs'}")
    assert words[-2:] == ["train", str(config)]
    words = shlex.split(dry_run(capsys, "deepspeed", "--hostfile", hosts, "--node-rank", "1", config))
    assert {"--no_ssh", "--node_rank=1"} <= set(words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no node"),
        ("a\n", "'a' is not of the form NAME slots=RANKS"),
        ("a slots=0\n", "not of the form"),
        ("a slots=1\na slots=2\n", "a is named twice"),
        (None, "is no hostfile"),
    ],
)
def test_what_is_no_hostfile(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_hostfile(path)


def test_the_plain_hostfile() -> None:
    assert read_hostfile(TEMPLATE.with_name("hostfile")) == {"node0": 8, "node1": 8}


def test_hostfiles_that_do_not_fit(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=3\n")
    assert "start 4 ranks" in refused(capsys, "deepspeed", "--hostfile", hosts, config)
    hosts.write_text("a slots=4\n")
    assert "is not among the 1 nodes" in refused(capsys, "deepspeed", "--hostfile", hosts, "--node-rank", "1", config)


def test_the_first_rank_is_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "1/2020_rank0.log", tmp_path / "2/2021_rank0.log"
    for path in (old, new):
        path.parent.mkdir()
    old.write_text("before\n")
    follower = Follower(tmp_path)
    new.write_text("one\n")
    (tmp_path / "2/2021_rank1.log").write_text("not this one\n")
    follower.show()
    new.write_text("one\ntwo\n")
    follower.show(), follower.show()
    assert capsys.readouterr().out == "one\ntwo\n"


# SLURM.


def script(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict[str, str], str]:
    """sbatch's options, and the whole."""
    text = dry_run(capsys, "slurm", *words)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, flags=re.M))
    return options, text


def settings_of(text: str) -> dict[str, Any]:
    """What bash makes of the script's settings."""
    names = ("farspan", "run", "run_dir", "again", "script", "gpus_per_node", "srun", "inside", "pyxis")
    lines = text.partition("# ---- end of settings")[0]
    show = "\n".join(f'printf "%s\\n" {name} "${{{name}[@]}}" --' for name in names)
    words = subprocess.run(["bash", "-uc", f"{lines}\n{show}"], capture_output=True, text=True, check=True).stdout
    found = (part.split("\n") for part in f"\n{words}".split("\n--\n") if part.strip())
    return {part[1] if not part[0] else part[0]: part[2:] if not part[0] else part[1:] for part in found}


def test_the_script_for_slurm(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--cpus-per-task", "2", "--partition", "long", "--mem", "10G", "--sbatch", "comment=it's two words"]
    words = ["--nodes", "2", "--time", "1-12", "--until-done", *more, config, "optimizer.lr=1e-4"]
    options, text = script(capsys, *words)
    assert options["nodes"] == "2" and options["ntasks-per-node"] == "2" and options["cpus-per-task"] == "2"
    assert options["time"] == "1-12" and options["signal"] == "USR1@120" and options["partition"] == "long"
    assert "requeue" in options and "gpus-per-node" not in options and options["open-mode"] == "append"
    assert shlex.split(options["comment"]) == ["it's two words"]
    assert shlex.split(options["output"]) == [str(tmp_path / "a run/logs/%j.out")]
    found = settings_of(text)
    assert found["run"] == [str(config), "optimizer.lr=1e-4"] and found["run_dir"] == [str(tmp_path / "a run")]
    assert found["again"] == ["--again", "requeue", "--max-restarts", "3", "--until-done"]
    assert found["farspan"][0] == sys.executable and found["gpus_per_node"] == ["0"]
    assert found["srun"] == ["srun", "--kill-on-bad-exit=1", "--distribution=block", "--cpu-bind=cores"]
    assert found["script"] == [str(tmp_path / "a run/launch/a-run.sbatch")]
    # The rest is the plain script's.
    end = "# ---- end of settings ----\n"
    assert text.partition(end)[2] == TEMPLATE.read_text().partition(end)[2] != ""
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not (tmp_path / "a run").exists()


def test_the_plain_script_has_every_setting(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, plain = settings_of(script(capsys, "--time", "60", config)[1]), settings_of(TEMPLATE.read_text())
    assert made.keys() == plain.keys()


def test_gpus(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, text = script(capsys, "--gpus-per-node", "4", "--time", "60", "--again", "chain", config)
    assert options["gpus-per-node"] == options["ntasks-per-node"] == "4"
    assert "no-requeue" in options and "requeue" not in options
    assert settings_of(text)["srun"][-1] == "--gpu-bind=none"
    assert settings_of(text)["gpus_per_node"] == ["4"]
    options, text = script(capsys, "--gpus-per-node", "a100:4", "--time", "60", config)
    assert options["gpus-per-node"] == "a100:4" and options["ntasks-per-node"] == "4"
    assert settings_of(text)["gpus_per_node"] == ["4"]


def test_cores_that_nobody_asked_for_are_mentioned(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in ((["--cpus-per-task", "8"], False), ([], True)):
        assert main(["launch", "slurm", "--dry-run", "--time", "60", *words, str(config)]) == 0
        assert ("without --cpus-per-task" in capsys.readouterr().err) == expected


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_containers(config: Path, capsys: pytest.CaptureFixture[str], runtime: str) -> None:
    container = ["--container", "an image", "--container-runtime", runtime, "--container-mounts", "/d:/d,/e:/data/set"]
    words = ["--gpus-per-node", "4", "--time", "60", *container, config]
    _, text = script(capsys, *words, "data.folder=/data/set")
    found = settings_of(text)
    assert found["farspan"] == ["farspan"]
    # What a rank needs, each once: the run folder lies beside the configuration; the user's own mounts come first.
    here, folder = str(Path.cwd()), config.parent
    mounts = f"{here}:{here},{folder}:{folder},/d:/d,/e:/data/set"
    if runtime == "pyxis":
        assert found["inside"] in ([], [""])
        expected = ["--container-image=an image", "--container-workdir", here, f"--container-mounts={mounts}"]
        assert found["pyxis"] == expected
    else:
        assert found["pyxis"] in ([], [""])
        assert found["inside"] == ["apptainer", "exec", "--nv", "--pwd", here, "--bind", mounts, "an image"]


def test_what_slurm_is_not_asked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "do not divide among --nodes 3" in refused(capsys, "slurm", "--nodes", "3", "--time", "60", config)
    assert "start 4 ranks" in refused(capsys, "slurm", "--ntasks-per-node", "3", "--time", "60", config)
    assert "leaves nothing beside checkpoint.margin_seconds 120" in refused(capsys, "slurm", "--time", "2", config)
    assert "need a GPU each" in refused(
        capsys, "slurm", "--gpus-per-node", "2", "--ntasks-per-node", "4", "--time", "9", config
    )
    assert "give --container IMAGE" in refused(capsys, "slurm", "--container-mounts", "/d:/d", "--time", "9", config)
    assert "not of the form OPTION=VALUE" in refused(capsys, "slurm", "--sbatch", "a b", "--time", "9", config)
    own = {"array=0-3": "one command a run", "time=9": "--time", "signal=B:TERM@60": "checkpoint.margin_seconds"}
    for option, instead in own.items():
        assert f"give {instead}" in refused(capsys, "slurm", "--sbatch", option, "--time", "9", config)
    strange = "data.folder=/a:b"
    assert "rename it" in refused(capsys, "slurm", "--container", "x", "--time", "9", config, strange)
    for gpus in ("a100:", ":8", "x"):
        with pytest.raises(SystemExit):
            main(["launch", "slurm", "--gpus-per-node", gpus, "--time", "9", str(config)])
        assert "is no number of GPUs" in capsys.readouterr().err


def test_no_signal_without_a_margin(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, _ = script(capsys, "--time", "2", config, "checkpoint.margin_seconds=0")
    assert "signal" not in options
    options, _ = script(capsys, "--time", "UNLIMITED", config)
    assert options["signal"] == "USR1@120"


def test_times_as_sbatch_reads_them() -> None:
    """sbatch(1): minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, and with seconds."""
    texts = {"5": 300, "5:30": 330, "2:5:30": 7530, "1-2": 93600, "1-2:3": 93780, "1-2:3:4": 93784, "0": None}
    assert {text: time_seconds(text) for text in texts} == texts
    assert time_seconds("UNLIMITED") is None
    for text in ("", "x", "1:2:3:4", "1-", "-1"):
        with pytest.raises(ValueError, match="is no time"):
            time_seconds(text)


def test_every_way_has_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for module, way in ((torchrun, "torchrun"), (deepspeed, "deepspeed"), (slurm, "slurm")):
        with pytest.raises(SystemExit):
            main(["launch", way, "--help"])
        assert module.DESCRIPTION.splitlines()[0] in capsys.readouterr().out
