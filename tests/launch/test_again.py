"""Whether a SLURM job comes back: every way in which one ends."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import settings

from farspan.launch import endings
from farspan.launch.cli import main
from farspan.launch.endings import Ending
from farspan.launch.launchers.again import Decision, JobState, Policy, decide, may_start
from farspan.launch.launchers.restarts import fruitless, record, records
from farspan.launch.progress import Progress

# What scontrol 22.05.8 prints of a job, shortened, with the fields that differ filled in.
TOLD = (
    "JobId=4 JobName=a b UserId=root(0) Priority=4294901756 Nice=0 Account=(null) JobState={} Reason={} "
    "Dependency=(null) Requeue={} Restarts={} BatchFlag=1 ExitCode=0:0 RunTime=00:00:05 TimeLimit=00:05:00 "
    "PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime={} SuspendTime=None Partition=main"
)
MIDDLE, DONE = Progress(4, 10), Progress(10, 10)


def told(
    state: str = "RUNNING", reason: str = "None", restarts: int = 0, preempted: str = "None", requeue: int = 1
) -> JobState:
    found = JobState.read(TOLD.format(state, reason, requeue, restarts, preempted))
    assert found is not None
    return found


def ended(
    code: int,
    job: JobState | None = None,
    said: tuple[Ending, ...] = (),
    *,
    progress: Progress = MIDDLE,
    again: str = "requeue",
    until_done: bool = True,
    restart: int = 0,
    in_vain: int = 1,
) -> Decision:
    policy = Policy(again, until_done, max_restarts=3)
    return decide(policy, progress, code, said, job or told(), restart, in_vain)


def test_a_job_as_scontrol_tells_of_it() -> None:
    job = told("COMPLETING", "TimeLimit", 2, "2026-01-01T00:00:00")
    assert (job.state, job.reason, job.restarts, job.preempted) == ("COMPLETING", "TimeLimit", 2, True)
    assert job.ran_out_of_time and job.is_ending and not told().is_ending
    assert job.may_return and not told(requeue=0).may_return
    assert JobState.read("") is None
    assert JobState.read("slurm_load_jobs error: Invalid job id specified") is None


@pytest.mark.parametrize("until_done", [True, False])
@pytest.mark.parametrize(
    ("code", "job"),
    [
        (75, told()),
        (75, None),  # SLURM does not answer
        (75, told("COMPLETING", "TimeLimit")),
        (137, told("COMPLETING", preempted="2026-01-01T00:00:00")),
    ],
)
def test_what_was_asked_to_stop_comes_back(code: int, job: JobState | None, until_done: bool) -> None:
    assert ended(code, job, until_done=until_done).answer == "requeue"
    assert ended(code, job, until_done=until_done, again="chain").answer == "chain"
    assert ended(code, job, until_done=until_done).asked
    assert ended(code, job, until_done=until_done, again="no").answer == str(code)
    assert ended(code, job, until_done=until_done, in_vain=99).answer == "requeue"


@pytest.mark.parametrize("until_done", [True, False])
def test_what_could_not_save_in_time_comes_back_for_a_while(until_done: bool) -> None:
    for code, job in ((137, told("COMPLETING", "TimeLimit")), (143, told("RUNNING", "TimeLimit")), (138, told())):
        decision = ended(code, job, until_done=until_done, in_vain=3)
        assert decision.answer == "requeue" and not decision.asked  # it counts
        assert ended(code, job, until_done=until_done, in_vain=4).answer == str(code)
    assert "set a longer --time" in ended(137, told("COMPLETING", "TimeLimit"), in_vain=4).why


@pytest.mark.parametrize("code", [0, 1, 137, 143])
def test_what_the_first_rank_said_goes_before_how_the_others_were_ended(code: int) -> None:
    """srun ends those that take longer to leave, and reports the highest code."""
    stopped = Ending(rank=0, code=75, time=5.0)
    decision = ended(code, None, (stopped,), until_done=False, in_vain=9)
    assert decision.answer == "requeue" and decision.asked
    wrong = Ending(rank=1, code=2, time=4.0, kind="ValueError", message="no such folder")
    assert ended(code, None, (wrong, stopped)).answer == "2"


def test_what_was_told_not_to_return_stays_ended() -> None:
    """scontrol update JobId=… Requeue=0, and then a signal: saved in full, and ended."""
    for code, asked in ((75, True), (137, False)):
        decision = ended(code, told(requeue=0))
        assert (decision.word, decision.code, decision.asked) == ("none", code, asked)
        assert "Requeue=0" in decision.why
    assert ended(75, told(requeue=0), again="chain").answer == "chain"


def test_a_lost_node_is_a_failure() -> None:
    """Requeued by SLURM itself where it may be; a chain goes on."""
    for job in (told("NODE_FAIL"), told("COMPLETING", "NodeDown")):
        assert ended(137, job, again="chain").answer == "chain"
        assert "lost a node" in ended(137, job, again="chain").why
        assert ended(137, job, again="chain", until_done=False).answer == "137"
        assert ended(137, job, again="chain", in_vain=4).answer == "137"
    assert "back into the queue" in ended(137, told("COMPLETING", "NodeDown", restarts=1)).why


@pytest.mark.parametrize("code", [1, 74, 76, 137, 143, 255])
def test_a_failure_comes_back_until_done(code: int) -> None:
    assert ended(code).answer == "requeue"
    assert not ended(code).asked
    assert ended(code, until_done=False).answer == str(code)
    assert ended(code, in_vain=3).answer == "requeue"
    assert ended(code, in_vain=4).answer == str(code)
    assert "4 starts in a row" in ended(code, in_vain=4).why
    assert ended(75, in_vain=9).answer == "requeue"  # it was asked, that is no failure


def test_what_is_cancelled_does_not_come_back() -> None:
    for code in (75, 137, 0):
        for state in ("COMPLETING", "CANCELLED"):
            assert ended(code, told(state)).answer == str(code)
            assert "cancelled" in ended(code, told(state)).why


def test_what_slurm_requeues_is_left_to_it() -> None:
    assert ended(75, told("COMPLETING", restarts=1)).answer == "0"
    assert ended(75, told("COMPLETING", restarts=3), restart=2).answer == "0"
    assert ended(137, told("PENDING", "BeginTime", restarts=1)).answer == "0"
    # Requeued before, cancelled now.
    assert "cancelled" in ended(75, told("COMPLETING", restarts=2), restart=2).why


def test_all_steps_are_done() -> None:
    for code in (0, 1, 75, 137):
        assert ended(code, told("COMPLETING"), progress=DONE) == Decision("none", "all 10 steps are done")


def test_what_only_the_user_can_mend_ends_it() -> None:
    error = Ending(rank=1, code=2, time=5.0, kind="ValueError", message="optimizer.lr is wrong")
    crash = Ending(rank=0, code=1, time=4.0, kind="RuntimeError", message="connection closed")
    decision = ended(137, None, (crash, error))
    assert (decision.answer, decision.word) == ("2", "none")
    assert "rank 1 said: optimizer.lr is wrong" in decision.why
    assert ended(1, None, (crash,)).answer == "requeue"
    held = Ending(rank=0, code=2, time=4.0, kind="InUse", message="runs/x is in use by process 3")
    assert ended(2, None, (held,)).answer == "requeue"  # what a lost node left will go
    assert ended(130).answer == "130"


def test_a_start() -> None:
    policy = Policy("chain", until_done=True, max_restarts=3)
    careful = Policy("chain", until_done=False, max_restarts=3)
    chained = {"event": "end", "then": "chain"}
    assert may_start(policy, MIDDLE, None, False, None, 0) is None
    assert may_start(policy, DONE, None, False, None, 0) == "all 10 steps are done"
    assert may_start(policy, MIDDLE, None, False, None, 3) is None
    assert "4 starts in a row" in (may_start(policy, MIDDLE, None, False, None, 4) or "")
    # A successor whose job before could not say how it ended.
    assert may_start(policy, MIDDLE, told("NODE_FAIL"), True, None, 1) is None
    assert may_start(policy, MIDDLE, None, True, None, 1) is None
    assert "cancelled" in (may_start(policy, MIDDLE, told("CANCELLED"), True, None, 1) or "")
    assert "--until-done" in (may_start(careful, MIDDLE, told("NODE_FAIL"), True, None, 1) or "")
    assert may_start(careful, MIDDLE, told("TIMEOUT"), True, None, 1) is None
    assert may_start(careful, MIDDLE, told("CANCELLED"), True, chained, 1) is None
    over = {"event": "end", "then": "none", "why": "cancelled at step 4"}
    assert "ended for good: cancelled" in (may_start(policy, MIDDLE, None, True, over, 1) or "")
    assert may_start(policy, MIDDLE, None, False, over, 1) is None


def test_starts_in_vain(tmp_path: Path) -> None:
    def starts(*events: tuple[str, int, bool]) -> int:
        lines = [{"event": event, "step": step, "asked": asked} for event, step, asked in events]
        return fruitless(lines, step=4)

    assert starts() == 0
    assert starts(("start", 0, False), ("end", 4, False)) == 0
    assert starts(("start", 0, False), ("start", 4, False), ("end", 4, False), ("start", 4, False)) == 2
    assert starts(("start", 4, False), ("end", 4, True), ("start", 4, False), ("end", 4, False)) == 1
    assert starts(("start", 4, False), ("end", 8, False), ("start", 8, False), ("start", 4, False)) == 1


def test_what_slurm_ends_and_starts_again_is_not_in_vain() -> None:
    def start(job: str, step: int = 4) -> dict[str, Any]:
        return {"event": "start", "step": step, "job": job}

    end = {"event": "end", "asked": False}
    assert fruitless([start("7", 0), *[start("7")] * 50], 4, before="7") == 0
    assert fruitless([start("7", 0), *[start("7")] * 50], 4, before="8") == 1  # a lost node, chained
    assert fruitless([start("7")] * 50, 4) == 1  # the one that runs
    assert fruitless([start("7"), end, start("7"), end], 4, before="7") == 2
    assert fruitless([start("7"), start("7"), end, start("7")], 4, before="7") == 1


def test_the_record(tmp_path: Path) -> None:
    record(tmp_path / "new", "start", step=4, nothing=None)
    with (tmp_path / "new/restarts.jsonl").open("a") as file:
        file.write('{"event": "end", "st')  # cut
    (line,) = records(tmp_path / "new")
    assert line.pop("time") and line == {"event": "start", "step": 4}
    assert records(tmp_path) == []


def test_last_words(tmp_path: Path) -> None:
    environ = {"FARSPAN_ENDINGS": str(tmp_path / "e"), "RANK": "3", "SLURM_PROCID": "5"}
    endings.note(2, ValueError("wrong"), "that is wrong", environ)
    endings.note(1, OSError("lost"), "x" * 2000, environ | {"RANK": "", "SLURM_PROCID": "5"})
    endings.note(1, environ={})
    (tmp_path / "e/rank-00009.json").write_text("{")
    found = endings.read(tmp_path / "e")
    assert [(one.rank, one.code, one.kind, one.message) for one in found] == [
        (3, 2, "ValueError", "that is wrong"),
        (5, 1, "OSError", "x" * 1000),
    ]
    assert endings.final(found) == found[0] and endings.final(found[1:]) is None
    assert endings.read(tmp_path / "nowhere") == []


def test_why_ranks_ended_that_an_agent_started_again(tmp_path: Path) -> None:
    """One of the last start that knows what went wrong says it, whoever was first to note that the other is gone."""
    environ = {"FARSPAN_ENDINGS": str(tmp_path)}
    for restart, rank, code in ((0, 7, 76), (1, 2, 75), (1, 0, 1), (1, 1, 74), (1, 3, 76)):
        endings.note(code, environ=environ | {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restart)})
    found = endings.read(tmp_path)
    assert [(one.restart, one.rank) for one in found] == [(0, 7), (1, 2), (1, 0), (1, 1), (1, 3)]
    cause = endings.cause(found)
    assert cause is not None and (cause.rank, cause.code) == (1, 74)
    assert endings.cause([]) is None and endings.cause(found[1:2]) is None
    assert endings.cause(found[:3]) == found[2]


def test_the_command(tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the script calls it."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(prepared, tmp_path / "run", 10, {})))
    logs = tmp_path / "run/logs/7-0"
    logs.mkdir(parents=True)
    me = ["--job", "7", "--series", "7", "--logs", str(logs), "--until-done"]

    def ask(moment: str, *words: str) -> str:
        assert main(["launch", "again", moment, *me, *words, str(config)]) == 0
        return capsys.readouterr().out

    assert ask("start", "--nodes", "n[1-2]") == "go\n"
    assert json.loads((logs / "expected.json").read_text())["versions"]["torch"]
    assert ask("end", "--code", "137", "--told", TOLD.format("RUNNING", "None", 1, 0, "None")) == "requeue\n"
    for restart in range(1, 4):
        assert ask("start", "--restart", str(restart)) == "go\n"
        assert ask("end", "--code", "137") == ("requeue\n" if restart < 3 else "137\n")
    assert ask("start", "--restart", "4") == "1\n"
    ends = [line for line in records(tmp_path / "run") if line["event"] == "end"]
    assert [line["then"] for line in ends] == ["requeue", "requeue", "requeue", "none"]
    assert not any("first_rank" in line for line in ends)
    # Another job is a new beginning.
    me[1] = me[3] = "8"
    assert ask("start") == "go\n"


def test_only_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "again", "middle", "--job", "1", "--series", "1", "--logs", str(tmp_path), "x.yaml"])
    with pytest.raises(argparse.ArgumentTypeError, match="'x' is not a number from 0 up"):
        from farspan.launch.options import count

        count("x")
