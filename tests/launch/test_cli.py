from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.launch import local, network, training
from farspan.launch.cli import main
from farspan.version import __version__

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER_VARIABLES, "FARSPAN_TRACEBACK", "SLURM_JOB_ID", "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "")  # so that what a test leaves is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(training, "_guarded", lambda environment: contextlib.nullcontext())
    monkeypatch.setattr(training, "die_with_launcher", lambda: None)
    monkeypatch.setattr(network, "prepare", lambda environment: None)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], types.ModuleType]:
    def make(name: str, code: str) -> types.ModuleType:
        module = types.ModuleType(name)
        exec(code, module.__dict__)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


@pytest.fixture
def calls(stub: Callable[[str, str], types.ModuleType]) -> list[Any]:
    """Stand-ins for configuration and training that note how they are called."""
    config = stub(
        "farspan.pretrain.config",
        """
from types import SimpleNamespace as Namespace
calls = []
parallel = Namespace(tensor=1, pipeline=1, data=None)
def check_world(config, world_size, device):
    calls.append(("check_world", world_size, device.type))
    if world_size == 3:
        raise ValueError("3 ranks do not fit")
""",
    )
    stub(
        "farspan.pretrain.config_file",
        """
from farspan.pretrain.config import Namespace, calls, parallel
def load_config(path, overrides):
    calls.append(("load_config", path, overrides))
    if path == "missing.yaml":
        raise ValueError("missing.yaml does not exist:\\n  make it")
    if path == "fault.yaml":
        import fractions
        fractions.Fraction("no number")
    return Namespace(parallel=parallel, to_yaml=lambda: "resolved: true\\n")
""",
    )
    stub(
        "farspan.pretrain.train",
        """
import contextlib
import os
from farspan.pretrain.config import calls
def train(config, *, resume, stop_after=None):
    calls.append(("train", resume, os.environ["RANK"], os.environ["WORLD_SIZE"]))
    if stop_after is not None:
        calls.append(("stop_after", stop_after))
    if resume == "interrupt":
        raise KeyboardInterrupt
    if resume == "no file":
        open("/does/not/exist")
    if resume == "no peer":
        raise ConnectionResetError("gone")
    if resume == "fault":
        raise RuntimeError("a fault")
""",
    )
    return config.calls


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    started: list[tuple[list[str], int]] = []

    def run_ranks(arguments: list[str], ranks: int, logs: object) -> int:
        assert logs is None
        started.append((arguments, ranks))
        return 5

    monkeypatch.setattr(local, "run_ranks", run_ranks)
    return started


def set_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in zip(LAUNCHER_VARIABLES, (rank, rank, 4, 4, "127.0.0.1", 29500), strict=True):
        monkeypatch.setenv(name, str(value))


def test_help_needs_nothing_slow() -> None:
    code = """if True:
        import sys
        from farspan.launch.cli import main
        try:
            main(sys.argv[1:])
        except SystemExit as end:
            assert end.code == 0
        slow = {"torch", "numpy", "yaml", "pydantic", "deepspeed", "megatron", "transformers", "datasets", "matplotlib"}
        sys.exit(f"imported {slow & set(sys.modules)}" if slow & set(sys.modules) else 0)
    """
    helps = (["train"], ["convert", "to-hf"], ["bench", "approximation"], ["bench", "kernels"], ["bench", "train"], [])
    for arguments in (*([*command, "--help"] for command in helps), ["--version"], ["version"]):
        ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_the_module_runs_as_the_console_script_does(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-m", "farspan.launch.cli", "--version"], capture_output=True, text=True)
    assert ended.stdout == f"farspan {__version__}\n"


def test_an_error_for_the_user_is_one_line_in_a_started_rank_too() -> None:
    # As local ranks run, where the module is called __main__; this error comes before anything slow is imported.
    ended = subprocess.run(
        [*local.COMMAND, "train", "a.yaml"], capture_output=True, text=True, env=os.environ | {"RANK": "1"}
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("farspan: [rank 1] RANK is set but LOCAL_RANK, WORLD_SIZE, ")
    assert ended.stderr.count("\n") == 1


def test_the_folders_of_a_clone_do_not_pass_for_packages() -> None:
    code = """if True:
        import importlib.util
        from farspan.launch.cli import main
        main(["version"])
        found = importlib.util.find_spec("launch")
        assert found is None, found
    """
    root = Path(local.__file__).resolve().parents[1]
    # -c puts the working directory on the path just as -m does.
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["prepare", "train", "convert", "version"]),
        (
            ["train", "--help"],
            ["--print-config", "--ranks", "--resume", "torchrun", "srun", "deepspeed"],
        ),
        (["convert", "--help"], ["to-hf", "from-hf"]),
        (["convert", "to-hf", "--help"], ["CHECKPOINT", "OUT", "--dtype"]),
    ],
)
def test_help(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in words if word not in text] == []
    assert "local_rank" not in text


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["train", "a.yaml", "--ranks", "0"], ["train", "a.yaml", "--rank=1x"], ["convert"]],
)
def test_a_command_line_that_cannot_be_read(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: farspan" in capsys.readouterr().err


@pytest.mark.parametrize("rest", [["b"], ["--key=value"], ["x.y=1", "--what"]])
def test_what_is_no_override_is_refused(rest: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "a.yaml", "--ranks", "1", *rest])
    assert end.value.code == 2
    assert f"unrecognized arguments: {rest[-1]}" in capsys.readouterr().err


def test_one_rank_trains_in_this_process(calls: list[Any], started: list[Any]) -> None:
    assert main(["train", "a.yaml", "x.y=1"]) == 0
    assert calls == [("load_config", "a.yaml", ["x.y=1"]), ("train", "auto", "0", "1")]
    assert started == []
    assert int(os.environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.yaml", "a.b=1", "--ranks", "1", "c.d=--x", "--resume", "never", "e.f=3"],
        ["--ranks", "1", "a.yaml", "--resume=never", "a.b=1", "c.d=--x", "e.f=3"],
    ],
)
def test_overrides_and_options_may_alternate(arguments: list[str], calls: list[Any]) -> None:
    assert main(["train", *arguments]) == 0
    assert calls == [("load_config", "a.yaml", ["a.b=1", "c.d=--x", "e.f=3"]), ("train", "never", "0", "1")]


def test_a_run_can_be_stopped_early(calls: list[Any], started: list[Any]) -> None:
    assert main(["train", "a.yaml", "--stop-after", "7"]) == 0
    assert calls[-1] == ("stop_after", 7)


def test_started_ranks_are_told_to_stop_early(calls: list[Any], started: list[Any]) -> None:
    assert main(["train", "a.yaml", "--stop-after", "7", "--ranks", "2"]) == 5
    assert started == [(["train", "a.yaml", "--resume", "auto", "--stop-after", "7"], 2)]


def test_under_a_launcher_the_process_is_one_rank(
    calls: list[Any], started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rank(monkeypatch, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert main(["--local_rank=3", "train", "a.yaml"]) == 0  # as deepspeed's launcher writes it
    assert calls[-1] == ("train", "auto", "3", "4")
    assert started == []


@pytest.mark.parametrize(
    ("gpus", "layout", "arguments", "ranks"),
    [
        (0, (2, 1, None), [], 2),
        (0, (2, 2, 2), [], 8),
        (0, (1, 1, None), ["--ranks", "4"], 4),
        (8, (2, 1, None), [], 8),
        (8, (2, 1, 2), [], 4),
        (8, (2, 1, None), ["--ranks", "2"], 2),
    ],
)
def test_how_many_ranks_start(
    gpus: int,
    layout: tuple[int, int, int | None],
    arguments: list[str],
    ranks: int,
    calls: list[Any],
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parallel = sys.modules["farspan.pretrain.config"].parallel
    parallel.tensor, parallel.pipeline, parallel.data = layout
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert main(["train", "a.yaml", "x.y=1", *arguments, "--resume", "runs/a/checkpoints/step-00000002"]) == 5
    assert started == [(["train", "a.yaml", "x.y=1", "--resume", "runs/a/checkpoints/step-00000002"], ranks)]
    assert calls[-1] == ("check_world", ranks, "cpu")


def test_a_layout_that_does_not_fit_is_said_before_anything_starts(
    calls: list[Any], started: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "a.yaml", "--ranks", "3"]) == 2
    assert capsys.readouterr().err == "farspan: 3 ranks do not fit\n"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["train", "a.yaml", "--ranks", "4"]) == 2
    assert "4 ranks need a GPU each and this machine shows 2" in capsys.readouterr().err
    assert started == []


def test_ranks_are_not_started_twice(
    calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rank(monkeypatch, 0)
    assert main(["train", "a.yaml", "--ranks", "2"]) == 2
    assert "a launcher already started them" in capsys.readouterr().err
    assert calls == []


def test_a_batch_script_without_srun_is_told_of_idle_nodes(
    calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert main(["train", "a.yaml"]) == 0
    assert "3 more nodes of this SLURM job stay idle" in capsys.readouterr().err


def test_print_config_is_for_one_rank(
    calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "a.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == "resolved: true\n"
    set_rank(monkeypatch, 1)
    assert main(["train", "a.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == ""
    assert all(call[0] == "load_config" for call in calls)


def test_an_error_for_the_user_is_one_line(
    calls: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "missing.yaml"]) == 2
    assert capsys.readouterr().err == "farspan: missing.yaml does not exist: make it\n"
    assert main(["train", "a.yaml", "--resume", "no file"]) == 2
    assert capsys.readouterr().err == "farspan: /does/not/exist: No such file or directory\n"
    set_rank(monkeypatch, 2)
    assert main(["train", "missing.yaml"]) == 2
    assert capsys.readouterr().err == "farspan: [rank 2] missing.yaml does not exist: make it\n"
    monkeypatch.setenv("FARSPAN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="does not exist"):
        main(["train", "missing.yaml"])


def test_a_fault_keeps_its_traceback(calls: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="a fault"):
        main(["train", "a.yaml", "--resume", "fault"])
    with pytest.raises(ConnectionResetError):
        main(["train", "a.yaml", "--resume", "no peer"])
    with pytest.raises(ValueError, match="no number"):  # from deep inside a library
        main(["train", "fault.yaml"])


def test_a_failure_is_noted_for_the_process_that_started_the_rank(
    calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "0"
    monkeypatch.setenv("FARSPAN_FAILURE_FILE", str(note))
    assert main(["train", "a.yaml"]) == 0
    assert not note.exists()
    before = time.time()
    with pytest.raises(RuntimeError, match="a fault"):
        main(["train", "a.yaml", "--resume", "fault"])
    assert before <= float(note.read_text()) <= time.time()
    note.unlink()
    assert main(["train", "missing.yaml"]) == 2
    assert note.exists()


def test_an_interrupt_is_exit_code_130(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "a.yaml", "--resume", "interrupt"]) == 130
    assert capsys.readouterr().err == "farspan: interrupted\n"


def test_prepare_brings_its_own_options(stub: Callable[[str, str], types.ModuleType]) -> None:
    stub(
        "farspan.pretrain.data.prepare",
        """
def add_arguments(parser):
    parser.add_argument("out")
    parser.add_argument("--seed", type=int)
def run(args):
    assert (args.out, args.seed) == ("tokens", 7)
    return 4
""",
    )
    assert main(["prepare", "tokens", "--seed", "7"]) == 4


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"farspan {__version__}"
    assert f"torch {torch.__version__}" in lines
