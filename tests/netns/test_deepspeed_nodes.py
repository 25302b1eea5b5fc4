"""DeepSpeed's launcher with a hostfile on two nodes with a network of their own: the link goes and comes back."""

from __future__ import annotations

import time

import pytest
from comparison import assert_identical
from netns import Network, why_not
from node_runs import NodeRun
from runs import Trainer

from farspan.launch.local import COMMAND

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(900)]
if reason := why_not("sshd", "ssh", "ssh-keygen", "pdsh"):
    pytestmark.append(pytest.mark.skip(reason=reason))

LIMIT = 8  # seconds without an answer after which a rank's guard ends it
EVERY = 10  # steps between checkpoints
RUN = {
    "model.hidden_dropout_prob": 0.1,
    "training.global_batch_size": 7,
    "health.hang_seconds": LIMIT,
    "training.timeout_seconds": 60,
    "checkpoint.interval": EVERY,
    "kernels.mode": "reference",
    "logging.interval": EVERY,
}
STEPS = 150


@pytest.fixture
def network():
    with Network(ssh=True) as network:
        yield network


def start(run: NodeRun, network: Network) -> None:
    """On the first node, from a folder that has what belongs in the environment of all ranks."""
    folder = run.config.parent
    (folder / "hosts").write_text("".join(f"{node.name} slots=1\n" for node in network.nodes))
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    words = ["launch", "deepspeed", "--hostfile", str(folder / "hosts"), str(run.config)]
    run.start(network.nodes[0], [*COMMAND, *words])


def test_the_link_is_cut_for_longer_than_the_limit(network, ranks, prepared, tmp_path, monkeypatch):
    run = NodeRun(prepared, tmp_path / "nodes", STEPS, RUN)
    monkeypatch.chdir(run.config.parent)  # where DeepSpeed looks for .deepspeed_env
    start(run, network)
    run.wait_for(lambda: run.saved(2 * EVERY), "training")
    network.cut("silent")
    time.sleep(1)
    stood = run.step
    time.sleep(LIMIT + 3)
    assert run.step == stood, "nothing goes on without the other replica"
    network.mend()
    assert run.wait() == {"n1": 0}, run.said()
    assert run.starts()[0] == (2, 1) and len(run.starts()) >= 2
    assert all(2 * EVERY < step <= stood + 1 for _, step in run.starts()[1:])
    assert list((run.folder / "hangs").iterdir()), "what hung was reported"
    whole = Trainer(ranks, prepared, tmp_path / "undisturbed")(STEPS, RUN | {"parallel.data": 2})
    assert run.steps() == whole.steps()
    assert_identical(run.weights(), whole.weights())
