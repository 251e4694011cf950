"""How processes that decode pictures begin: from a fork server, with one thread, and ended with their parent.

A fork server is a fresh process that has imported what they need: forking a process with threads and models is not
safe, and starting each anew costs seconds and memory for each. A script that starts any needs the usual
`if __name__ == "__main__"`.
"""

import multiprocessing
import os
import threading
from multiprocessing.context import ForkServerContext

import pyarrow as pa
import torch

# A process has one fork server, whoever asks first, so it imports what any of its children needs.
MODULES = ["blip_core.data.decoding", "blip_core.data.workers"]


def fork_server() -> ForkServerContext:
    """The context that children start from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    return context


def begin() -> None:
    """What a child does first."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    # the process that forked is the fork server, which lives as long as its children do: the one that asked counts
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
