"""The folder that an export is written to: whose it is, which files of it stand, and their checksums.

`export.json` comes first and says what the folder is for; SHA256SUMS comes last. What is written in between is noted,
file by file, before the file gets its name: a file that stands under a name of ours without a note is not ours.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from blip_core import stores
from blip_core.errors import WorkspaceError
from blip_core.files import TEMPORARY, append_text, atomic_file, file_digest, read_json, sweep, write_json

MANIFEST, CHECKSUMS, NOTES = "export.json", "SHA256SUMS", ".progress.jsonl"


class Written(NamedTuple):
    """A file of an export: its name, the pairs in it, its bytes, their sha256 in hexadecimal."""

    name: str
    pairs: int
    bytes: int
    sha256: str


def claim(folder: Path, about: dict[str, Any]) -> dict[str, Written]:
    """Makes the folder that of this export, and returns the files of it that stand, by name.

    Args:
        about: what the export is; of its `fingerprint` there is one export.

    Raises WorkspaceError where the folder holds something else.
    """
    with stores.reaching(folder):
        manifest = folder / MANIFEST
        if manifest.exists():
            standing = read_json(manifest)
            if not isinstance(standing, dict) or standing.get("fingerprint") != about["fingerprint"]:
                raise WorkspaceError(
                    f"{folder}: holds an export of something else, or the corpus has changed since; name another folder"
                )
            return {written.name: written for written in _noted(folder, standing) if _stands(folder, written)}
        if folder.exists() and not folder.is_dir():
            raise WorkspaceError(f"{folder}: is a file; name a folder that is new or empty")
        other = next((path.name for path in _listed(folder) if not TEMPORARY.fullmatch(path.name)), None)
        if other is not None:
            raise WorkspaceError(f"{folder}: holds {other}, which is of no export; name a folder that is new or empty")
    write_json(manifest, about | {"complete": False})
    return {}


def write_file(folder: Path, name: str, write: Callable[[Path], int]) -> Written:
    """Writes one file in one atomic step; `write` gets a path and returns how many pairs it has put there."""
    path = folder / name
    if path.exists():
        raise WorkspaceError(
            f"{path}: stands, and this export has not written it; move it away, or name another folder"
        )
    with atomic_file(path) as temporary:
        pairs = write(temporary)
        written = Written(name, pairs, temporary.stat().st_size, file_digest(temporary))
        _note(folder / NOTES, written)
    return written


def finish(folder: Path, about: dict[str, Any], files: list[Written], index: str | None = None) -> None:
    """Writes what is said of all files, which is the same after whatever interruptions, and the checksums.

    Args:
        index: the name of a JSON file that has the number of pairs by the name of each file; None: there is none.
    """
    complete = about | {"complete": True, "files": [file._asdict() for file in files]}
    described = {MANIFEST: complete} | ({index: {file.name: file.pairs for file in files}} if index else {})
    sums = "".join(f"{file.sha256}  {file.name}\n" for file in files)
    for name, value in described.items():
        if not (folder / name).exists() or read_json(folder / name) != value:
            write_json(folder / name, value)
        sums += f"{hashlib.sha256(stores.read_bytes(folder / name)).hexdigest()}  {name}\n"
    if not (folder / CHECKSUMS).exists() or stores.read_bytes(folder / CHECKSUMS) != sums.encode():
        with atomic_file(folder / CHECKSUMS) as temporary:
            temporary.write_text(sums, encoding="utf-8")
    (folder / NOTES).unlink(missing_ok=True)
    sweep(folder)


def _listed(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.exists() else iter(())


def _stands(folder: Path, written: Written) -> bool:
    path = folder / written.name
    return path.exists() and path.stat().st_size == written.bytes


def _noted(folder: Path, manifest: dict[str, Any]) -> Iterator[Written]:
    for file in manifest.get("files", []):
        yield Written(**file)
    notes = folder / NOTES
    lines = stores.read_bytes(notes).decode(errors="replace").splitlines() if notes.exists() else []
    for line in lines:
        try:
            yield Written(**json.loads(line))
        except ValueError:  # torn: its writer was killed, and the file has no name yet
            continue


def _note(notes: Path, written: Written) -> None:
    line = f"\n{json.dumps(written._asdict())}\n"  # begins anew after a torn line
    if stores.is_remote(notes):
        append_text(notes, line)
        return
    with notes.open("a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
