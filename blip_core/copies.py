"""Copies of a store's files on this machine, for readers that need a file on a disk: checkpoints, tokenizers, states.

A copy is known by the address and what the store says of each file, so that a checkpoint that was replaced is another
one. Copies lie in the cache folder, the longest unused ones go, and any may be removed when nothing runs.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blip_core import stores
from blip_core.errors import WorkspaceError
from blip_core.files import atomic_folder, fingerprint

KEPT_BYTES = 20 * 2**30
# A copy that was asked for so lately may be about to be opened.
UNUSED_SECONDS = 3600
TRIES = 5

Files = dict[str, tuple[int, str]]


def local_copy(path: Path) -> Path:
    """The file or folder itself where it is on this machine, else a copy of all of it that is of one moment.

    Raises WorkspaceError where there is nothing, or it cannot be fetched.
    """
    if not stores.is_remote(path):
        return path
    for _ in range(TRIES):
        with stores.reaching(path):
            files = _listed(path)
        folder = stores.cache_folder() / "copies" / fingerprint(str(path), files)
        with _alone(folder):
            if folder.is_dir() or _fetch(path, files, folder):
                os.utime(folder)
                return folder / path.name
    raise WorkspaceError(f"{path}: changes whenever it is read; wait until nothing writes there")


def _listed(path: Path) -> Files:
    """Size and identity of each file below a path by its name from there; of the file itself, if it is one."""
    root = stores.key(path)
    found = stores.filesystem(path).find(root, detail=True)
    if not found:
        raise FileNotFoundError("there is no such file or folder")
    return {
        name.removeprefix(root).strip("/"): (info["size"], str(info.get("ETag") or info.get("LastModified")))
        for name, info in found.items()
    }


def _fetch(path: Path, files: Files, folder: Path) -> bool:
    """Makes the copy; False where the files are not as they were listed any more."""
    with suppress(_ChangedError), atomic_folder(folder) as temporary:
        for name in files:
            target = temporary / path.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with stores.reaching(path / name if name else path), suppress(FileNotFoundError):
                stores.fetch(path / name if name else path, target)
        with stores.reaching(path):
            if _listed(path) != files:
                raise _ChangedError
        _make_room(folder, sum(size for size, _ in files.values()))
    return folder.is_dir()


class _ChangedError(Exception):
    """The files have changed while they were fetched."""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock, so that of many processes one fetches and the others find it done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks: the copy is made twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_room(folder: Path, needed: int) -> None:
    """Removes copies, the longest unused first, until what is needed fits beside them."""
    others = [other for other in folder.parent.glob("[!.]*") if other.is_dir() and other != folder]
    sizes = {other: sum(file.stat().st_size for file in other.rglob("*") if file.is_file()) for other in others}
    held = sum(sizes.values())
    for used, other in sorted((other.stat().st_mtime, other) for other in others):
        if held + needed <= KEPT_BYTES or time.time() - used < UNUSED_SECONDS:
            return
        shutil.rmtree(other, ignore_errors=True)
        held -= sizes[other]
