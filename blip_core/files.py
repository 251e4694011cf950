"""Parts get their final name in one atomic step, so whatever stands under a final name is whole.

A writer works in a hidden folder beside its target, `.<name>.capfilt-<host>-<process>-<random>.tmp`, and holds a lock
in it for as long as it lives. What a killed writer left has no lock: the next one that writes there takes it away.
What belongs into an object store is written in this machine's cache folder and put there when it is whole.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from blip_core import stores
from blip_core.errors import WorkspaceError

TEMPORARY = re.compile(r"\..+\.capfilt-.+-\d+-[0-9a-f]{8}\.tmp")
# A folder may hold a hundred thousand parts, so a process looks through it at most this often.
SECONDS_BETWEEN_SWEEPS = 10

LOCK = ".lock"
ASIDE = ".old"
MARKER = "config.json"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path of this machine to write to; gives it the name `path` when the block ends without an
    error."""
    with _workplace(path) as folder:
        temporary = folder / f".{path.name}"
        yield temporary
        if stores.is_remote(path):
            stores.put(temporary, path)
            return
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)


@contextmanager
def atomic_folder(path: Path, marker: str = MARKER) -> Iterator[Path]:
    """Yields a temporary folder of this machine to fill; puts it in the place of `path` when the block ends without an
    error.

    A folder that stood there is gone only when the new one stands. A process that is killed between the two renames
    leaves the old one aside, where the next sweep finds it and puts it back. An object store has no folders: there
    the file named `marker` goes first and comes last, and no reader takes a folder without it to stand.
    """
    with _workplace(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        if stores.is_remote(path):
            stores.put_folder(temporary, path, marker)
            return
        old = folder / ASIDE / path.name
        if path.exists():
            if path.is_symlink() or not path.is_dir():
                raise WorkspaceError(f"{path}: cannot be written (is no folder)")
            old.parent.mkdir()
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            with suppress(OSError):  # another writer's stands there, or none did
                old.rename(path)
            raise


def atomic_copy(source: Path, target: Path) -> None:
    """Gives a file a second name in one atomic step: one file of two names, where that can be, else a copy."""
    if stores.is_remote(source) and stores.is_remote(target):
        with stores.reaching(target):
            stores.copy(source, target)
        return
    with atomic_file(target) as temporary:
        if stores.is_remote(source):
            stores.fetch(source, temporary)
            return
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)


def append_text(path: Path, text: str) -> None:
    """Adds text to the end of a file, which has one writer; in an object store, which cannot, the file is put anew."""
    if not stores.is_remote(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        return
    with stores.reaching(path):
        try:
            before = stores.read_bytes(path)
        except FileNotFoundError:
            before = b""
        stores.put_bytes(before + text.encode(), path)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it where they are missing; an object store needs none."""
    if not stores.is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder with all that is in it, as far as that can be; nothing where there is none."""
    if stores.is_remote(path):
        with stores.reaching(path):
            stores.remove_folder(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed writers left in a folder. Living writers' files stay, whichever process or host is theirs.

    A file system whose locks other hosts do not see is safe to write in, but only from one host.
    """
    if stores.is_remote(folder):
        return
    with suppress(OSError), os.scandir(folder) as entries:
        for left in [Path(entry.path) for entry in entries if TEMPORARY.fullmatch(entry.name)]:
            with suppress(OSError):  # gone, another's, or of a file system without locks: not ours to take
                _sweep_one(left)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON (sorted keys, indented) in one atomic step."""
    with atomic_file(path) as temporary:
        temporary.write_text(_json(value), encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Reads a JSON file of the workspace. Raises WorkspaceError where it is torn."""
    try:
        return json.loads(stores.read_bytes(path).decode())
    except stores.errors(ValueError) as error:
        raise WorkspaceError(f"{path}: not a readable JSON file ({error})") from error


def add_to_account(path: Path, name: str, amount: float) -> None:
    """Adds to a number in a JSON file of numbers by name, one writer after the other.

    On this machine a lock on the folder sees to it; S3 refuses what another writer has overtaken, and it is tried
    again. Where there are neither, two writers at one moment may lose one addition.
    """
    if stores.is_remote(path):
        with stores.reaching(path):
            stores.change(path, lambda before: _json(_added(json.loads(before or b"{}"), name, amount)).encode())
        return
    make_folder(path.parent)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        write_json(path, _added(read_json(path) if path.exists() else {}, name, amount))
    finally:
        os.close(folder)


def _added(account: dict[str, float], name: str, amount: float) -> dict[str, float]:
    return {**account, name: round(account.get(name, 0) + amount, 3)}


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*values: Any) -> str:
    """16 hexadecimal digits that change when any of the JSON-like values does."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A folder of this writer alone, beside `path` or in the cache folder; gone when the block ends."""
    parent = stores.cache_folder() / "writing" if stores.is_remote(path) else path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkspaceError(f"{parent}: the folder cannot be made ({error.strerror})") from error
    _sweep_now_and_then(parent, int(time.monotonic() / SECONDS_BETWEEN_SWEEPS))
    folder, lock = None, None
    try:
        folder, lock = _locked_folder(parent / path.name)
        yield folder
    except stores.errors() as error:
        raise WorkspaceError(f"{path}: cannot be written ({stores.reason(error)})") from error
    finally:
        if folder is not None and lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)  # NFS keeps the folder of an open file


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new folder and the descriptor of its locked file. A sweep may come between the two: then another is made."""
    while True:
        name = f".{path.name}.capfilt-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        folder = path.parent / name
        folder.mkdir()
        with suppress(FileNotFoundError):
            lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
            with suppress(OSError):  # a file system without locks: nobody else can take one either, and so sweep
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _stands(folder / LOCK, lock):
                return folder, lock
            os.close(lock)


def _stands(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sweep_one(left: Path) -> None:
    lock = os.open(left / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for old in (left / ASIDE).glob("*"):
            if not (left.parent / old.name).exists():
                old.rename(left.parent / old.name)
        shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(lock)


@lru_cache(maxsize=64)
def _sweep_now_and_then(folder: Path, period: int) -> None:
    sweep(folder)
