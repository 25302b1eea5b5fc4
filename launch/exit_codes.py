"""What the exit code of ``farspan train`` says to whoever supervises it.

Numbers of sysexits.h where it has a fitting one.  A signal that ended a process counts as 128 + its number, as in a
shell.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping

DONE = 0  # all steps of the run are done
FAULT = 1  # something broke; its traceback was printed
USER_ERROR = 2  # said in one line; starting again changes nothing
IO_ERROR = 74  # EX_IOERR: a disk was full or failed, said in one line; starting again may go well
STOPPED = 75  # EX_TEMPFAIL: asked to stop, state saved; the same command goes on
HUNG = 76  # no sign of life for too long; the stacks are in the run folder
INTERRUPTED = 130  # Ctrl-C

_LAST_OUT_SECONDS = 1.0  # in which the other ranks end
_MAY_PASS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, getattr(errno, "EREMOTEIO", errno.EIO)),
}


def of_system(error: OSError) -> int:
    """Of an error of the system: whether it may go away by itself.  One without a number is of a write that came to no
    end."""
    if isinstance(error, PermissionError):
        return USER_ERROR
    return IO_ERROR if error.errno is None or error.errno in _MAY_PASS else USER_ERROR


def of_stop(rank: int, environ: Mapping[str, str] = os.environ) -> int:
    """Of a rank that was asked to stop, when all is saved.

    Launchers end all ranks when one of them ends with a code that is not 0: only the first says STOPPED, when the
    others have gone.  Torchrun's agent would start the ranks again, so that there it says nothing.
    """
    if rank > 0 or "TORCHELASTIC_RUN_ID" in environ:
        return DONE
    time.sleep(_LAST_OUT_SECONDS)
    return STOPPED
