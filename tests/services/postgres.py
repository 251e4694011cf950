"""A PostgreSQL of a test's own, from Debian's package, as an ordinary user in a temporary folder."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.server import free_port
from services.program import Program, accepts

USER = "postgres"  # whom Debian's package makes; PostgreSQL refuses to run as root
DATABASE = "prefect"


class Postgres(Program):
    """The server as a program, and the URL of its database for Prefect."""

    def __init__(self, bin: Path, folder: Path, port: int, user: str | None) -> None:
        command = [
            str(bin / "postgres"),
            "-D",
            str(folder / "data"),
            "-p",
            str(port),
            "-k",
            str(folder),
            "-h",
            "127.0.0.1",
        ]
        super().__init__(command, folder / "log", lambda: accepts(port), user=user)
        self.port = port
        self.url = f"postgresql+asyncpg://{USER}@127.0.0.1:{port}/{DATABASE}"


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL with an empty database; skips the test where it is not installed."""
    bin = _programs()
    folder = Path(tempfile.mkdtemp(prefix="capfilt-postgres-"))
    user = USER if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    try:
        port = free_port()
        initdb = [str(bin / "initdb"), "-D", str(folder / "data"), "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, user=user, cwd=folder)
        with Postgres(bin, folder, port, user) as server:
            server.start()
            createdb = [str(bin / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", USER, DATABASE]
            subprocess.run(createdb, check=True, capture_output=True)
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    """The folder of the newest installed version's programs."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if versions:
        if os.geteuid() == 0 and USER not in {entry.pw_name for entry in pwd.getpwall()}:
            pytest.skip(f"root cannot run PostgreSQL, and there is no user {USER}")
        return versions[-1].parent
    if found := shutil.which("initdb"):
        return Path(found).parent
    pytest.skip("postgresql is not installed")
