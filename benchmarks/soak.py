"""Faults, one after another, over one run that is started the way clusters start it: it finishes, nothing is lost.

A tiny run of two replicas is started by `farspan launch torchrun` on a disk of its own.  At random moments something
happens to it: a rank is killed, stopped for good, the agent or the launcher is killed, the disk is full, a shard of the
data is cut or has other tokens, the newest checkpoint is damaged, a second job is started on the same folder.  Where a
fault needs a human (a damaged shard, the launcher that was killed) the human is a loop here that mends it and gives the
same command again.  At the end every step must be there once, with the loss and gradient norm of an undisturbed run,
and the last checkpoint must have its weights and optimizer, bit for bit.

    python benchmarks/soak.py [--faults 200] [--seed 1] [--only KIND …] [--out benchmarks/soak]

As root on Linux: a disk that can be filled is mounted for it (tmpfs).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]
sys.path.append(str(ROOT / "tests/support"))

from faults import Member, alive, members  # noqa: E402
from runs import MODEL, prepare_text, settings  # noqa: E402

from farspan.benchmarks.about import about, bullets  # noqa: E402
from farspan.launch.exit_codes import DONE, IO_ERROR, USER_ERROR  # noqa: E402
from farspan.launch.local import COMMAND  # noqa: E402
from farspan.pretrain import checkpoint as ckpt  # noqa: E402
from farspan.pretrain.checkpoint.folders import candidates  # noqa: E402
from farspan.pretrain.metrics import read_metrics  # noqa: E402

PACKAGES = ("torch", "megatron-core", "deepspeed")
HANG_SECONDS = 3.0
INTERVAL = 10  # steps between saves
BETWEEN = 20  # at most so many steps between two faults
BESIDE = {"second-job": 250, "full-disk": 20}  # about so many more are made beside some
DISK_BYTES = 48 * 2**20
PATIENCE_SECONDS = 240.0  # for the run to make a step again
TINY = {
    "model": MODEL | {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 130},
    "model.hidden_dropout_prob": 0.1,
    "model.attention_probs_dropout_prob": 0.1,
    "data.sequence_length": 128,
    "training.global_batch_size": 8,
    "parallel.data": 2,
    "parallel.zero_stage": 1,
    "checkpoint.interval": INTERVAL,
    "checkpoint.keep_last": 3,
    "health.hang_seconds": HANG_SECONDS,
    "logging.tensorboard": True,
}


class Failed(Exception):
    """The run did not do what it must."""


@dataclasses.dataclass
class Told:
    """What is counted of a kind of fault."""

    faults: int = 0
    seconds: float = 0.0  # from the fault to the next step that had not been made before
    steps_again: int = 0  # steps that were made a second time
    by_hand: int = 0  # commands given again


class Job:
    """The run as somebody started it, and what lies beneath."""

    def __init__(self, place: Path, steps: int) -> None:
        self.place, self.steps = place, steps
        self.data, self.run_dir = place / "data", place / "disk" / "run"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = place / "log"
        self.starts = 0

    def write(self, name: str, run_dir: Path) -> Path:
        path = self.place / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings(self.data, run_dir, self.steps, TINY)), encoding="utf-8")
        return path

    def start(self) -> None:
        """What a human does: give the command (again)."""
        words = ["launch", "torchrun", "--ranks-per-node", "2", str(self.write("run", self.run_dir))]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*COMMAND, *words], env=environment(), stdout=log, stderr=log)
        self.starts += 1

    @property
    def code(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def ranks(self) -> dict[int, Member]:
        assert self.process is not None
        return members(self.process.pid)

    def agents(self) -> list[int]:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(OSError):
            return [int(pid) for pid in children.read_text().split()]
        return []

    def step(self) -> int:
        """The last step that metrics.jsonl tells of; 0 where there is none."""
        try:
            with (self.run_dir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return 0
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                values = json.loads(line)
                if "loss" in values:
                    return int(values["step"])
        return 0

    def until(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise Failed(f"{what}: not in {seconds:.0f} s, at step {self.step()}, exit code {self.code}")
            time.sleep(0.02)

    def goes_on(self, before: int) -> bool:
        """Whether a step after ``before`` is made; a launcher that has ended is started again, once it was said why."""
        if self.code is not None and self.step() < self.steps:
            self.start()
        return self.step() > before


def environment() -> dict[str, str]:
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    return {k: v for k, v in os.environ.items() if k not in left_out} | {"OMP_NUM_THREADS": "1"}


# What happens to it.  Each takes the job while it trains; what needs mending is mended when it returns.


def rank_killed(job: Job, rng: random.Random) -> None:
    victim = rng.choice(sorted(job.ranks().values(), key=lambda member: member.rank))
    victim.kill()


def rank_stopped(job: Job, rng: random.Random) -> None:
    """Nothing will ever continue it: its guard must notice."""
    reports = len(list((job.run_dir / "hangs").glob("*/summary.txt")))
    victim = rng.choice(sorted(job.ranks().values(), key=lambda member: member.rank))
    victim.stop()
    job.until(lambda: not alive(victim.pid), "a stopped rank was not ended", HANG_SECONDS + 60)
    found = sorted((job.run_dir / "hangs").glob("*/summary.txt"))
    if len(found) <= reports:
        there = [str(path.relative_to(job.run_dir)) for path in sorted((job.run_dir / "hangs").rglob("*"))]
        raise Failed(f"no report of a stopped rank; there are {', '.join(there)}")
    if f"rank {victim.rank}" not in found[-1].read_text():
        raise Failed(f"{found[-1]} does not name rank {victim.rank}")


def agent_killed(job: Job, rng: random.Random) -> None:
    for pid in job.agents():
        os.kill(pid, signal.SIGKILL)


def launcher_killed(job: Job, rng: random.Random) -> None:
    assert job.process is not None
    job.process.kill()
    job.process.wait()


def disk_full(job: Job, rng: random.Random) -> None:
    """Until a save has failed, or the run has ended for it."""
    filler = job.run_dir.parent / "filler"
    failed = failed_saves(job)
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size):
                        pass
        end = time.monotonic() + 20
        while failed_saves(job) == failed and job.code is None and time.monotonic() < end:
            time.sleep(0.05)  # its steps are not to be seen: what is reported of them waits for room
    finally:
        filler.unlink(missing_ok=True)


def failed_saves(job: Job) -> int:
    return job.log.read_bytes().count(b" was not saved (")


@contextlib.contextmanager
def other_content(path: Path, content: bytes) -> Iterator[None]:
    """A file has another content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def is_refused(job: Job, rng: random.Random, words: str) -> None:
    """The ranks start anew, find the damage, and say it in a line that names what is damaged."""
    said = job.log.read_bytes().count(words.encode())
    rank_killed(job, rng)
    job.until(lambda: job.code is not None, "ranks went on with damaged data")
    if job.code != USER_ERROR or job.log.read_bytes().count(words.encode()) <= said:
        raise Failed(f"damaged data: exit code {job.code}, and {words!r} was not said")


def shard_unreadable(job: Job, rng: random.Random) -> None:
    shard = job.data / "train/00000.bin"
    content = shard.read_bytes()
    with other_content(shard, content[: rng.randrange(len(content))]):
        is_refused(job, rng, str(shard))


def batch_poisoned(job: Job, rng: random.Random) -> None:
    """Other tokens, all of the vocabulary: nothing but a checksum can tell."""
    shard = job.data / "train/00000.bin"
    content = bytearray(shard.read_bytes())
    for _ in range(50):
        at = rng.randrange(len(content) // 4) * 2
        content[at : at + 2] = rng.randrange(5, 250).to_bytes(2, "little")
    with other_content(shard, bytes(content)):
        is_refused(job, rng, str(shard))


def checkpoint_damaged(job: Job, rng: random.Random) -> None:
    """A byte of the newest one is another, and the run must go on from the one before."""
    job.until(lambda: len(candidates(job.run_dir / "checkpoints")) >= 2, "no two checkpoints")
    for member in job.ranks().values():
        with contextlib.suppress(ProcessLookupError):
            member.stop()  # so that no newer one comes
    files = sorted(candidates(job.run_dir / "checkpoints")[0].glob("*.safetensors"))
    path = rng.choice(files)
    with path.open("r+b") as file:
        file.seek(rng.randrange(path.stat().st_size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ (1 << rng.randrange(8))]))
    for member in job.ranks().values():
        with contextlib.suppress(ProcessLookupError):
            member.kill()


def second_job(job: Job, rng: random.Random) -> None:
    """Another rank on the same folder is refused, and the run does not notice."""
    words = [*COMMAND, "train", str(job.write("run", job.run_dir)), "parallel.data=1"]
    ended = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    if ended.returncode != USER_ERROR or " is in use by process " not in ended.stderr:
        raise Failed(f"a second job on the folder: exit code {ended.returncode}, {ended.stderr[-300:]}")


KINDS: dict[str, tuple[str, Callable[[Job, random.Random], None], int]] = {
    # what it is called, what happens, how often of a hundred
    "kill-rank": ("kill -9 of a rank", rank_killed, 17),
    "stop-rank": ("SIGSTOP of a rank, for good", rank_stopped, 15),
    "kill-agent": ("kill -9 of torchrun's agent", agent_killed, 10),
    "kill-launcher": ("kill -9 of the launcher", launcher_killed, 5),
    "full-disk": ("full disk", disk_full, 23),
    "unreadable-shard": ("shard of the data cut", shard_unreadable, 8),
    "poisoned-batch": ("other tokens in the data", batch_poisoned, 8),
    "damaged-checkpoint": ("newest checkpoint damaged, ranks killed", checkpoint_damaged, 10),
    "second-job": ("second job on the run folder", second_job, 4),
}


def kinds_of(count: int, only: list[str], rng: random.Random) -> list[str]:
    """So many faults in random order: each kind at least once, as far as there are so many, else by its share."""
    names = only or list(KINDS)
    share = sum(KINDS[name][2] for name in names)
    often = {name: max(1, round(count * KINDS[name][2] / share)) for name in names}
    while sum(often.values()) > max(count, len(names)):
        often[max(often, key=often.__getitem__)] -= 1
    chosen = [name for name in names for _ in range(often[name])]
    rng.shuffle(chosen)
    while len(chosen) < count:
        chosen.append(rng.choice(names))
    return chosen[:count]


def soak(place: Path, count: int, only: list[str], seed: int) -> dict[str, Any]:
    """Run it all; the figures.  ``Failed`` where something is not as it must be."""
    rng = random.Random(seed)
    chosen = kinds_of(count, only, rng)
    beside = sum(BESIDE.get(name, 0) for name in chosen)
    job = Job(place, steps=(len(chosen) + 4) * BETWEEN * 2 // 3 + beside)
    prepare_text(place)
    began = time.monotonic()
    undisturbed = place / "undisturbed"
    alone = [*COMMAND, "train", str(job.write("undisturbed", undisturbed)), "--ranks", "2"]
    subprocess.run(alone, env=environment(), check=True, stdout=subprocess.DEVNULL)
    alone_seconds, began = time.monotonic() - began, time.monotonic()
    told: dict[str, Told] = collections.defaultdict(Told)
    job.start()
    for number, name in enumerate(chosen, 1):
        about, starts, begun = told[name], job.starts, len(beginnings(job))
        target = min(job.step() + rng.randint(1, BETWEEN), job.steps - 2 * INTERVAL)
        job.until(lambda: job.goes_on(target - 1), f"before fault {number} ({name})")  # noqa: B023
        job.until(lambda: len(job.ranks()) == 2, "two ranks")
        time.sleep(rng.uniform(0, 0.1))
        before, since = job.step(), time.monotonic()
        KINDS[name][1](job, rng)
        job.until(lambda: job.goes_on(before), f"after fault {number} ({name})")  # noqa: B023
        about.faults += 1
        about.seconds += time.monotonic() - since
        about.steps_again += max((before - step for step in beginnings(job)[begun:]), default=0)
        about.by_hand += job.starts - starts
        print(f"  {number} of {len(chosen)}: {name} at step {before}, {time.monotonic() - since:.1f} s", flush=True)
    ended = (DONE, IO_ERROR)
    while job.code != DONE:
        seen = -1
        while job.code is None and job.step() > seen:  # however many are left
            seen = job.step()
            job.until(lambda: job.code is not None or job.step() >= seen + INTERVAL, "the end of the run")  # noqa: B023
        if job.code not in ended:
            raise Failed(f"the run ended with exit code {job.code}")
        if job.code != DONE:
            job.start()
    compare(undisturbed, job)
    seconds = time.monotonic() - began
    return {"faults": len(chosen), "seed": seed, "steps": job.steps, "seconds": seconds, "alone_seconds": alone_seconds,
            "kinds": {name: dataclasses.asdict(told[name]) for name in KINDS if name in told}}  # fmt: skip


def beginnings(job: Job) -> list[int]:
    """The step before that with which each start of the ranks began, so far."""
    return [int(step) - 1 for step in re.findall(r": steps (\d+) to ", job.log.read_text(errors="replace"))]


def compare(undisturbed: Path, job: Job) -> None:
    """Every step once, and all of the last checkpoint, bit for bit; no process and no file left behind."""
    ours, theirs = (steps_of(folder) for folder in (job.run_dir, undisturbed))
    if [step for step, *_ in ours] != list(range(1, job.steps + 1)):
        raise Failed("metrics.jsonl does not have every step once")
    for one, other in zip(ours, theirs, strict=True):
        if one != other:
            raise Failed(f"step {one[0]}: {one[1:]} is not the undisturbed run's {other[1:]}")
    readers = [ckpt.Reader(ckpt.find(folder)) for folder in (job.run_dir, undisturbed)]
    if any(reader.manifest.step != job.steps for reader in readers):
        raise Failed("the last checkpoint is not that of the last step")
    for name in readers[0].names():
        for kind in readers[0].kinds(name):
            if not torch.equal(*(reader.tensor(name, kind=kind) for reader in readers)):
                raise Failed(f"{kind} of {name} is not the undisturbed run's")
    left = [path.name for path in (job.run_dir / "checkpoints").glob(".step-*")]
    left += [path.name for path in job.run_dir.glob("*lease*")]
    left += subprocess.run(["pgrep", "-f", "-a", str(job.place)], capture_output=True, text=True).stdout.splitlines()
    if left:
        raise Failed(f"left behind: {', '.join(left)}")


def steps_of(folder: Path) -> list[tuple[int, float, float]]:
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A disk that can be filled, at ``place/disk``."""
    (place / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", place / "disk"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place / "disk"], check=False)


def page(results: dict[str, Any], machine: dict[str, str]) -> str:
    rows = [
        f"| {KINDS[name][0]} | {told['faults']} | {told['seconds'] / max(told['faults'], 1):.1f} | "
        f"{told['steps_again'] / max(told['faults'], 1):.1f} | {told['by_hand']} |"
        for name, told in results["kinds"].items()
    ]
    total = {key: sum(told[key] for told in results["kinds"].values()) for key in ("faults", "by_hand")}
    return "\n".join(
        [
            "# A soak: faults over one run",
            "",
            f"{results['faults']} faults, one after another at random moments, over one run of "
            f"{results['steps']} steps",
            f"(two replicas, ZeRO 1, gloo, `farspan launch torchrun`, a checkpoint every {INTERVAL} steps, saved",
            "asynchronously). It finished. Every step is in metrics.jsonl once, with the loss and gradient norm of an",
            "undisturbed run; the last checkpoint has its weights and optimizer state: all of it bit for bit. Nothing",
            "was left behind, no process and no file.",
            f"`python benchmarks/soak.py --faults {results['faults']} --seed {results['seed']}`",
            "",
            *bullets(machine),
            "",
            "Seconds and steps are means of a fault: until a step was made that had not been made before, and steps",
            "that were made a second time. By hand: how often the command had to be given again (a loop did it): after",
            "damaged data, which only a human can mend, and where the launcher itself was killed (its ranks are asked",
            "to stop then, and make another step or two before they have saved: hence few seconds).",
            "",
            "| fault | how often | seconds | steps again | by hand |",
            "|---|---|---|---|---|",
            *rows,
            f"| all | {total['faults']} | | | {total['by_hand']} |",
            "",
            f"{results['seconds'] / 60:.0f} minutes; the undisturbed run took {results['alone_seconds'] / 60:.1f}.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(KINDS), default=[])
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    args = parser.parse_args()
    machine = about(*PACKAGES)
    with tempfile.TemporaryDirectory(prefix="farspan-soak-") as folder, small_disk(Path(folder)):
        place = Path(folder)
        try:
            results = soak(place, args.faults, args.only, args.seed)
        except Failed as failed:
            print((place / "log").read_text(errors="replace")[-6000:], file=sys.stderr)
            print(f"failed: {failed}", file=sys.stderr)
            return 1
        finally:
            subprocess.run(["pkill", "-9", "-f", str(place)], check=False)
    print(page(results, machine))
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps({**results, "about": machine}, indent=2) + "\n")
        args.out.with_suffix(".md").write_text(page(results, machine))
    return 0


if __name__ == "__main__":
    sys.exit(main())
