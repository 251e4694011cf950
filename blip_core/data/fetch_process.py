"""The program that blip_core.data.fetch starts: img2dataset, in a process that dies with its parent.

It runs by its path (`python -P fetch_process.py PARENT SETTINGS LIMITS CLUSTER`), and of this project imports only what
guards its connections; a worker that cannot import it fetches nothing.
On Linux img2dataset's workers start by fork and without torch, of which webdataset would import all: it starts in a
fifth of the time. On a Ray cluster they are Ray's, and end when this process, which drives them, does.
"""

import ctypes
import importlib
import json
import multiprocessing
import multiprocessing.context
import multiprocessing.pool
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
LIMITS_VARIABLE = "CAPFILT_DOWNLOAD_LIMITS"


class ForkingContext(multiprocessing.context.ForkContext):
    """Stands for the spawn context that img2dataset asks for."""

    def Pool(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
    ) -> multiprocessing.pool.Pool:
        """A pool whose workers are all forked now, before there are threads; none is replaced later."""
        return super().Pool(processes, initializer, initargs)


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when `parent`, which started it, is gone; where it is already, ends it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died between the start of this process and the call
        os._exit(1)


def let_forked_die_with_their_parent() -> None:
    """Has every process that is forked from now on begin with `die_with_parent`."""
    forking = 0

    def note() -> None:
        nonlocal forking
        forking = os.getpid()

    os.register_at_fork(before=note, after_in_child=lambda: die_with_parent(forking))


def start_workers_by_fork() -> None:
    """Makes img2dataset's processes copies of this one, so that its libraries are imported once, not three times."""
    context = ForkingContext()
    multiprocessing.get_context = lambda method=None: context  # type: ignore[assignment]
    multiprocessing.context.SpawnProcess = multiprocessing.context.ForkProcess  # type: ignore[assignment, misc]
    sys.modules["torch"] = None  # type: ignore[assignment]  # webdataset goes without


def guard(limits: dict[str, Any]) -> None:
    """Lets this process, and those forked from it, reach only what `limits` (of blip_core.data.guard) allow."""
    module = importlib.import_module("blip_core.data.guard")
    module.install_guard(module.Limits(**limits))


def main(parent: int, settings: dict[str, Any], limits: dict[str, Any], cluster: dict[str, Any] | None) -> None:
    """Downloads as `settings` (arguments of img2dataset.download) say, within the limits, while process `parent` lives.

    `cluster` has ray.init's address and the environment of its workers; None: the workers are this process's own.
    """
    os.environ[LIMITS_VARIABLE] = json.dumps(limits)  # for processes that are not forked
    guard(limits)
    if sys.platform == "linux":
        die_with_parent(parent)
        if cluster is None:
            let_forked_die_with_their_parent()
            start_workers_by_fork()
    if cluster is not None:
        workers = {"env_vars": cluster["environment"], "worker_process_setup_hook": lambda: guard(limits)}
        importlib.import_module("ray").init(cluster["address"], logging_level="ERROR", runtime_env=workers)
    importlib.import_module("img2dataset").download(**settings)


if __name__ in ("__main__", "__mp_main__"):
    sys.path.append(str(Path(__file__).parents[2]))
if __name__ == "__main__":
    main(int(sys.argv[1]), *map(json.loads, sys.argv[2:]))
elif __name__ == "__mp_main__":  # a worker that multiprocessing started anew, as it does where it cannot fork
    guard(json.loads(os.environ[LIMITS_VARIABLE]))
