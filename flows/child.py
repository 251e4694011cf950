"""Runs a command that does not outlive its starter, even when the starter is killed with SIGKILL.

`python -m flows.child STARTER_PID COMMAND...` asks the kernel (Linux: PR_SET_PDEATHSIG) to kill it with the
process that started it, and then becomes the command. Elsewhere the command is run as it is.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_starter(starter: int) -> None:
    """Ties this process to `starter`, its parent. Leaves at once if the parent has gone already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != starter:
        raise SystemExit(1)


if __name__ == "__main__":
    die_with_starter(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
