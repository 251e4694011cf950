"""A Ray cluster of a test's own: one node on loopback, with cores to its name, which only the test may use."""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.server import free_port
from services.program import Program


class Ray(Program):
    """The cluster's head as a program; `address` is where it is, `secret` what its users' environment must have."""

    def __init__(self, folder: Path, cores: int) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment = {**os.environ, **self.secret, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        words = ["start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port)]
        words += ["--num-cpus", str(cores), "--num-gpus", "0", "--include-dashboard", "false"]
        words += ["--temp-dir", str(folder), "--disable-usage-stats"]
        log = folder / "ray.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", *words]
        super().__init__(command, log, lambda: "Ray runtime started" in log.read_text(errors="replace"), environment)


@contextmanager
def ray(cores: int) -> Iterator[Ray]:
    """A running cluster; skips the test where Ray is not installed."""
    pytest.importorskip("ray")
    # a short name: Ray's sockets lie in this folder
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    try:
        with Ray(folder, cores) as head:
            head.start()
            yield head
    finally:
        shutil.rmtree(folder, ignore_errors=True)
