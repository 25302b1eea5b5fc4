"""torchrun on two nodes with a network of their own: the link goes and comes back, a node goes and comes back."""

from __future__ import annotations

import time

import pytest
from comparison import RELATIVE, assert_identical
from netns import Network, why_not
from node_runs import NodeRun, is_clean
from runs import Trainer

from farspan.benchmarks.layouts import worst
from farspan.launch.exit_codes import STOPPED
from farspan.launch.local import COMMAND

pytestmark = [pytest.mark.alone, pytest.mark.timeout(900)]
if reason := why_not():
    pytestmark.append(pytest.mark.skip(reason=reason))

LIMIT = 8  # seconds without an answer after which a rank's guard ends it
EVERY = 10  # steps between checkpoints
RUN = {
    "model.hidden_dropout_prob": 0.1,
    "training.global_batch_size": 7,  # so that two replicas do not have as many rows
    "health.hang_seconds": LIMIT,
    "training.timeout_seconds": 60,
    "optimizer.lr": 1e-4,
    "checkpoint.interval": EVERY,
    "checkpoint.keep_last": 0,
    "kernels.mode": "reference",
    "logging.interval": EVERY,
}
# Of torchrun's rendezvous, in seconds: quicker than its defaults to see that a node is gone.
OPTIONS = {"join_timeout": 100, "last_call_timeout": 4, "read_timeout": 6, "keep_alive_interval": 1}


@pytest.fixture
def network():
    with Network() as network:
        yield network


@pytest.fixture
def undisturbed(ranks, prepared, tmp_path):
    """The same run with nothing in its way, on two ranks of this machine."""
    return lambda steps: Trainer(ranks, prepared, tmp_path / "undisturbed")(steps, RUN | {"parallel.data": 2})


@pytest.fixture
def nodes_run(prepared, tmp_path):
    return lambda steps: NodeRun(prepared, tmp_path / "nodes", steps, RUN)


def start(run: NodeRun, network: Network, node: int, nodes: str = "2") -> None:
    options = [f"--rendezvous-option={key}={value}" for key, value in OPTIONS.items()]
    place = ["--nodes", nodes, "--node-rank", str(node), "--rendezvous", "n1:29500", "--ranks-per-node", "1"]
    run.start(network.nodes[node], [*COMMAND, "launch", "torchrun", *place, *options, str(run.config)])


@pytest.mark.parametrize("how", [pytest.param("down", marks=pytest.mark.long), "silent"])
def test_the_link_is_cut_for_longer_than_the_limit(network, nodes_run, undisturbed, how):
    run = nodes_run(200)
    start(run, network, 0)
    start(run, network, 1)
    run.wait_for(lambda: run.saved(2 * EVERY), "training")
    network.cut(how)
    time.sleep(1)
    stood = run.step
    time.sleep(LIMIT + 3)
    assert run.step == stood, "nothing goes on without the other replica"
    network.mend()
    assert run.wait() == {"n1": 0, "n2": 0}, run.said()
    assert run.starts()[0] == (2, 1) and len(run.starts()) >= 2
    assert {(data, (step - 1) % EVERY) for data, step in run.starts()} == {(2, 0)}, "each from a checkpoint"
    assert all(2 * EVERY < step <= stood + 1 for _, step in run.starts()[1:])
    assert list((run.folder / "hangs").iterdir()), "what hung was reported"
    assert is_clean(network)
    whole = undisturbed(200)
    assert run.steps() == whole.steps()
    assert_identical(run.weights(), whole.weights())


@pytest.mark.long
def test_the_link_is_cut_for_less(network, nodes_run, undisturbed):
    run = nodes_run(120)
    start(run, network, 0)
    start(run, network, 1)
    run.wait_for(lambda: run.step > EVERY, "training")
    network.cut("silent")
    time.sleep(LIMIT / 3)
    network.mend()
    assert run.wait() == {"n1": 0, "n2": 0}, run.said()
    assert run.starts() == [(2, 1)], "nothing was started again"
    whole = undisturbed(120)
    assert run.steps() == whole.steps()
    assert_identical(run.weights(), whole.weights())


@pytest.mark.long
def test_a_node_is_lost_and_comes_back(network, nodes_run, undisturbed):
    """The run goes on with half of the replicas, and with all of them when the node is there again."""
    run = nodes_run(100_000)  # until it is asked to stop
    start(run, network, 0, "1:2")
    start(run, network, 1, "1:2")
    run.wait_for(lambda: run.saved(EVERY), "training")
    assert run.starts() == [(2, 1)]
    network.cut("silent")
    network.nodes[1].kill()
    run.wait_for(lambda: run.starts()[-1][0] == 1, "going on alone")
    alone_from = run.starts()[-1][1]
    run.wait_for(lambda: run.step > alone_from + EVERY, "training alone")
    network.mend()
    start(run, network, 1, "1:2")
    run.wait_for(lambda: run.starts()[-1][0] == 2, "training together again")
    again_from = run.starts()[-1][1]
    run.wait_for(lambda: run.step > again_from + EVERY, "training together")
    run.processes[network.nodes[0]].terminate()  # its rank tells the other, and both save
    assert run.wait(network.nodes[0]) == {"n1": STOPPED}, run.said()
    network.nodes[1].kill()  # nobody has asked this one: it would wait for the first
    assert [data for data, _ in run.starts()] == [2, 1, 2]
    said = run.log(network.nodes[0]).read_text(errors="replace")
    assert f"asked to stop (SIGTERM): saving after step {again_from - 1};" in said, "no step was lost"
    whole = undisturbed(len(run.steps()))
    assert max(worst(run.steps(), whole.steps())) <= RELATIVE
