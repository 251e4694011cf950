"""Prefect's server and workers as processes of a test's own, on SQLite or on PostgreSQL with Redis."""

import os
import sys
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from flows.server import free_port
from services.program import Program

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "NO_PROXY": "127.0.0.1,localhost",
    "OMP_NUM_THREADS": "1",
}


def redis_messaging(port: int) -> dict[str, str]:
    """The settings by which Prefect's server keeps events, leases and its own tasks in Redis."""
    return {
        "PREFECT_SERVER_EVENTS_MESSAGING_BROKER": "prefect_redis.messaging",
        "PREFECT_SERVER_EVENTS_MESSAGING_CACHE": "prefect_redis.messaging",
        "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
        "PREFECT_REDIS_MESSAGING_HOST": "127.0.0.1",
        "PREFECT_REDIS_MESSAGING_PORT": str(port),
        "PREFECT_SERVER_DOCKET_URL": f"redis://127.0.0.1:{port}/1",
    }


class Server(Program):
    """Prefect's server; the same port and history after a restart.

    Args:
        folder: its home: SQLite database, profile and log.
        database: the URL of a PostgreSQL; None: SQLite in the folder.
        settings: more of Prefect's environment variables, such as those of `redis_messaging`.
    """

    def __init__(self, folder: Path, database: str | None = None, settings: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        self.ui = f"http://127.0.0.1:{port}"
        environment = {**os.environ, **QUIET, "PREFECT_HOME": str(folder), **(settings or {})}
        if database:
            environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
        environment["PREFECT_SERVER_UI_API_URL"] = self.api
        environment.pop("PREFECT_API_URL", None)
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        super().__init__(command, folder / "server.log", self._healthy, environment)

    @property
    def client(self) -> dict[str, str]:
        """The environment of the programs that use this server."""
        return {**os.environ, **QUIET, "PREFECT_HOME": self.environment["PREFECT_HOME"], "PREFECT_API_URL": self.api}

    def _healthy(self) -> bool:
        try:
            with closing(urllib.request.urlopen(f"{self.api}/health", timeout=5)):
                return True
        except OSError:
            return False


class Worker(Program):
    """A process worker of one pool.

    Args:
        server: whom it asks for runs.
        pool: of which.
        folder: where its log is kept.
        limit: flow runs at a time; None: any number.
        settings: more environment variables, which its flow runs have too.
    """

    def __init__(
        self, server: Server, pool: str, folder: Path, limit: int | None = 1, settings: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
        command += [] if limit is None else ["--limit", str(limit)]
        environment = server.client | {"PREFECT_WORKER_QUERY_SECONDS": "2"} | dict(settings or {})
        log = folder / f"worker-{pool}.log"
        super().__init__(command, log, lambda: "started!" in log.read_text(errors="replace"), environment)
