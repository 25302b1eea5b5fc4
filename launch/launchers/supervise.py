"""Keeps a launcher going until the run's steps are done.

The launcher (torchrun, deepspeed, ``farspan train --ranks N``) starts ranks; here it is started, signals are passed to
the ranks so that they save, what it leaves is cleared away, and it is started again from the newest checkpoint as long
as that makes sense.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from ...pretrain.stop import end_time
from .. import endings
from ..endings import ENDINGS, Ending
from ..exit_codes import DONE, FAULT, INTERRUPTED, STOPPED, USER_ERROR
from ..parent import die_with
from ..progress import Progress
from .common import Job, quoted, say
from .processes import kill_all, ranks_below
from .restarts import FRUITLESS, record

MARK = "FARSPAN_LAUNCH"  # in the environment of all that one start has started
_POLL_SECONDS = 0.2
_WORDS_SECONDS = 3.0  # after the first rank's last words, for those of the others
_STOPPING = (signal.SIGTERM, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Launcher:
    """How ranks are started on this node, and reached."""

    name: str
    command: Callable[[int], Sequence[str]]  # of start number 0, 1, …
    env: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    ranks: Callable[[int], list[int]] = ranks_below  # process ids of the ranks below a launcher's process
    tells_codes: bool = True  # of ranks; False: whatever went wrong, it ends with FAULT
    sees_ranks: bool = True  # they are among this node's processes
    # Tell ranks that are not among this node's processes; whether that was possible.
    tell: Callable[[int], bool] = lambda _: False
    endings: Callable[[int], Path] | None = None  # folder of a start for ranks' last words; None: one of this node
    watch: Callable[[], None] = lambda: None  # called again and again while it runs


@dataclasses.dataclass(frozen=True)
class Limits:
    """When to start again."""

    fruitless: int = FRUITLESS  # starts again in a row without a new checkpoint; only such count that had ranks
    first_pause: float = 1.0
    longest_pause: float = 60.0
    margin_seconds: float = 0.0  # before the end of the job's time nothing is started


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one start ended."""

    code: int
    had_ranks: bool
    last_words: Ending | None  # that make starting again useless


def supervise(
    launcher: Launcher,
    progress: Callable[[], Progress],
    limits: Limits = Limits(),
    *,
    run_dir: Path | None = None,
) -> int:
    """Start the launcher until the steps are done; return an exit code (``exit_codes``).

    SIGTERM and SIGUSR1 are passed to the ranks, so that they save, and end it (STOPPED); SIGINT ends it.  It ends too
    where a rank said what only the user can mend (USER_ERROR), and after ``limits.fruitless`` starts again in a row
    that had ranks and brought no checkpoint.  What never had ranks, a rendezvous that does not come about, is tried
    again without end.  ``run_dir``: where every start and end is recorded.
    """
    return _Supervisor(launcher, progress, limits, run_dir).run()


def keep_going(launcher: Launcher, job: Job, args: argparse.Namespace, *, records: bool = True) -> int:
    """What the commands do with a launcher (options: ``add_supervision``): say its command with --dry-run, else
    ``supervise`` it.  ``records``: whether this node is the one that records starts and ends."""
    if args.dry_run:
        print(quoted(launcher.command(0)))
        return DONE
    if not job.progress().done:
        job.check_folders()
    say(f"logs of ranks are in {job.run_dir / 'logs'}")
    limits = Limits(fruitless=args.max_restarts, margin_seconds=job.config.checkpoint.margin_seconds)
    return supervise(launcher, job.progress, limits, run_dir=job.run_dir if records else None)


class _Supervisor:
    def __init__(
        self, launcher: Launcher, progress: Callable[[], Progress], limits: Limits, run_dir: Path | None
    ) -> None:
        self._launcher, self._progress, self._limits, self._run_dir = launcher, progress, limits, run_dir
        self._received: list[int] = []
        self._asked: int | None = None  # the signal that asked the run to stop
        self._interrupts = 0
        self._without_ranks_until: float | None = None  # after a signal that reached none

    def run(self) -> int:
        def remember(number: int, _: FrameType | None) -> None:
            self._received.append(number)

        previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, *_STOPPING)}
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        fruitless, failures, start = 0, 0, 0
        before = self._progress()
        if before.done:
            say(f"all {before.steps} steps are done")
            return DONE
        while True:
            self._record("start", start=start, step=before.step, steps=before.steps)
            outcome = self._start(start)
            now = self._progress()
            code = self._conclusion(outcome, now)
            if code is None:
                if now.step > before.step:
                    fruitless, failures = 0, 0
                else:
                    fruitless += outcome.had_ranks
                if fruitless > self._limits.fruitless:
                    say(f"{fruitless} starts in a row brought no new checkpoint (exit code {outcome.code}): given up")
                    code = outcome.code if outcome.code not in (DONE, STOPPED) else FAULT
            self._record("end", start=start, step=now.step, code=outcome.code, asked=self._asked, gives_up=code)
            if code is not None:
                return code
            pause = min(self._limits.longest_pause, self._limits.first_pause * 2**failures)
            failures, start, before = failures + 1, start + 1, now
            say(
                f"{self._launcher.name} ended with exit code {outcome.code} at step {now.step} of {now.steps}: "
                f"started again in {pause:g} s"
            )
            if not self._rest(pause):
                return INTERRUPTED if self._interrupts else STOPPED

    def _conclusion(self, outcome: Outcome, now: Progress) -> int | None:
        """The exit code where there is nothing to start again."""
        if now.done:
            return DONE
        if self._interrupts:
            return INTERRUPTED
        if outcome.last_words is not None:
            say(f"not started again: rank {outcome.last_words.rank} said: {outcome.last_words.message}")
            return USER_ERROR
        over = time.time() >= end_time(self._launcher.env) - self._limits.margin_seconds
        if self._asked is not None or over or outcome.code == STOPPED:
            return STOPPED if outcome.code in (DONE, STOPPED) else outcome.code
        return None

    def _start(self, number: int) -> Outcome:
        mark = uuid.uuid4().hex
        with tempfile.TemporaryDirectory(prefix="farspan-launch-") as folder:
            env = dict(self._launcher.env) | {MARK: mark}
            notes = Path(folder) if self._launcher.endings is None else self._launcher.endings(number)
            env[ENDINGS] = str(notes)
            process = subprocess.Popen(
                self._launcher.command(number),
                env=env,
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C reaches the ranks once, through here
                preexec_fn=die_with(os.getpid(), signal.SIGTERM),
            )
            try:
                had_ranks, last_words = self._watch(process, notes)
            finally:
                if process.poll() is None:
                    process.kill()
                code = process.wait()
                # What an agent that was killed leaves would go on with the run beside the next start.
                kill_all(MARK, mark)
            self._launcher.watch()
            said = endings.read(notes)
            code = code if code >= 0 else 128 - code
            if code == FAULT and not self._launcher.tells_codes and (cause := endings.cause(said)) is not None:
                code = cause.code
            return Outcome(code, had_ranks or bool(said), last_words or endings.final(said))

    def _watch(self, process: subprocess.Popen[bytes], folder: Path) -> tuple[bool, Ending | None]:
        """Until the launcher has ended: whether it had ranks, and what makes starting again useless."""
        told: set[int] | None = None  # ranks that know that they are to stop
        had_ranks, last_words, end_at = not self._launcher.sees_ranks, None, None
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            self._launcher.watch()
            had_ranks = had_ranks or bool(self._launcher.ranks(process.pid))
            while self._received:
                number = self._received.pop(0)
                if number == signal.SIGINT:
                    self._interrupts += 1
                    process.send_signal(signal.SIGKILL if self._interrupts > 1 else signal.SIGINT)
                else:
                    self._asked = number
                    told = (told or set()) | self._tell(number, process)
            if told is not None and set(self._launcher.ranks(process.pid)) - told:
                process.terminate()  # it has started ranks again that should have stopped
            if last_words is None:
                last_words = endings.final(endings.read(folder))
                end_at = None if last_words is None else time.monotonic() + _WORDS_SECONDS
            elif end_at is not None and time.monotonic() > end_at:
                process.terminate()
                end_at = None
            if self._without_ranks_until is not None and time.monotonic() > self._without_ranks_until:
                process.terminate()
                self._without_ranks_until = None
        return had_ranks, last_words

    def _tell(self, number: int, process: subprocess.Popen[bytes]) -> set[int]:
        """Pass a signal to the ranks themselves: launchers end theirs with little time, or die of it."""
        ranks = self._launcher.ranks(process.pid)
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(rank, number)
        if not ranks and not self._launcher.tell(number):
            # It has none yet, or they have saved and gone a moment ago, and it is about to end by itself.
            self._without_ranks_until = time.monotonic() + _WORDS_SECONDS
        return set(ranks)

    def _rest(self, seconds: float) -> bool:
        """Wait; False where a signal ended it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._received:
                self._interrupts += signal.SIGINT in self._received
                return False
            time.sleep(min(_POLL_SECONDS, seconds))
        return True

    def _record(self, event: str, **about: object) -> None:
        if self._run_dir is not None:
            record(self._run_dir, event, by=self._launcher.name, **about)
