"""A run spread over the nodes of a network, each of which a launcher keeps going."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from netns import Network, Node
from runs import Run, settings

from farspan.pretrain.metrics import read_metrics

SLOW = 240.0  # seconds in which anything that works has happened on a busy machine


class NodeRun(Run):
    """What runs on which node; its configuration is ``folder``/run.yaml, its logs are beside it."""

    def __init__(self, data: Path, folder: Path, steps: int, overrides: dict[str, Any]) -> None:
        super().__init__(folder / "run")
        folder.mkdir()
        self.values = settings(data, self.folder, steps, overrides)
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(self.values))
        self.processes: dict[Node, subprocess.Popen[bytes]] = {}

    def log(self, node: Node) -> Path:
        return self.config.with_name(f"{node.name}.log")

    def start(self, node: Node, words: Sequence[str], **env: str) -> None:
        """What starts the run there, with this in its environment."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "SLURM_"))}
        inherited |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | env
        self.processes[node] = node.start(words, self.log(node), inherited)

    @property
    def step(self) -> int:
        """The last that was logged."""
        path = self.folder / "metrics.jsonl"
        return max((line["step"] for line in read_metrics(path)), default=0) if path.is_file() else 0

    def saved(self, step: int) -> bool:
        """Whether there is a whole checkpoint of this step."""
        return (self.folder / f"checkpoints/step-{step:08d}").is_dir()

    def wait_for(self, condition: Any, what: str, seconds: float = SLOW) -> None:
        """Until it holds; AssertionError with what the nodes said where it does not, or a launcher ends before."""
        limit = time.monotonic() + seconds
        while not condition():
            codes = {node.name: process.poll() for node, process in self.processes.items()}
            over = time.monotonic() > limit
            assert not over and None in codes.values(), f"not {what} (step {self.step}, {codes})\n{self.said()}"
            time.sleep(0.05)

    def wait(self, *nodes: Node) -> dict[str, int]:
        """Until these, or all, have ended: their exit codes."""
        limit, codes = time.monotonic() + SLOW, {}
        for node in nodes or tuple(self.processes):
            try:
                codes[node.name] = self.processes[node].wait(max(limit - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{node.name} does not end (step {self.step})\n{self.said()}") from None
        return codes

    def starts(self) -> list[tuple[int, int]]:
        """Every start of the ranks that came to train: (replicas, first step), as the first rank has said."""
        said = "\n".join(path.read_text(errors="replace") for path in sorted(self.config.parent.glob("*.log")))
        found = re.findall(r"× data (\d+), ZeRO \d on cpu: steps (\d+) to", said)
        return [(int(data), int(step)) for data, step in found]

    def said(self) -> str:
        """The end of the nodes' logs."""
        logs = sorted(self.config.parent.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in logs)


def is_clean(network: Network) -> bool:
    """Whether nothing runs on the nodes any more."""
    return not any(node.pids() for node in network.nodes)
