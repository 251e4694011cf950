"""A small disk of a test's own, which can be filled to the last byte."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILLER = ".filler"
_BLOCK = 1 << 16


def can_mount() -> bool:
    """Whether this process may mount a tmpfs: Linux, root, and no container that forbids it."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of that size, mounted on a new folder while the block runs. Only where `can_mount`."""
    folder.mkdir(parents=True)
    options = ["-o", f"size={megabytes}m,mode=0777"]
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def fill(folder: Path) -> None:
    """Writes a file until nothing fits beside it, not a byte."""
    with (folder / FILLER).open("ab", buffering=0) as file:
        size = _BLOCK
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2


def free(folder: Path) -> None:
    """Takes the file away again."""
    (folder / FILLER).unlink(missing_ok=True)
