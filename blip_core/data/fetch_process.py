"""The program that blip_core.data.fetch starts: img2dataset, in a process that dies with its parent.

It runs by its path (`python -P fetch_process.py PARENT SETTINGS CLUSTER`) and imports nothing of this project.
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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from email.message import Message
from typing import IO, Any, NoReturn

PR_SET_PDEATHSIG = 1


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


class TellingRetryAfter(urllib.request.HTTPDefaultErrorHandler):
    """Adds what a server says of another try to the error's message, all that img2dataset keeps of an answer."""

    def http_error_default(
        self, req: urllib.request.Request, fp: IO[bytes] | None, code: int, msg: str, hdrs: Message
    ) -> NoReturn:
        """Raises urllib's error."""
        asked = hdrs.get("Retry-After")
        raise urllib.error.HTTPError(req.full_url, code, f"{msg} [Retry-After: {asked}]" if asked else msg, hdrs, fp)


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


def tell_retry_after() -> None:
    """Lets this process's errors say when a server wants to be asked again."""
    urllib.request.install_opener(urllib.request.build_opener(TellingRetryAfter))


def main(parent: int, settings: dict[str, Any], cluster: dict[str, Any] | None) -> None:
    """Downloads as `settings` (arguments of img2dataset.download) say, while process `parent` lives.

    `cluster` has ray.init's address and the environment of its workers; None: the workers are this process's own.
    """
    tell_retry_after()  # which forked workers keep
    if sys.platform == "linux":
        die_with_parent(parent)
        if cluster is None:
            let_forked_die_with_their_parent()
            start_workers_by_fork()
    if cluster is not None:
        workers = {"env_vars": cluster["environment"], "worker_process_setup_hook": tell_retry_after}
        importlib.import_module("ray").init(cluster["address"], logging_level="ERROR", runtime_env=workers)
    importlib.import_module("img2dataset").download(**settings)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
