"""Weights on disk: safetensors, or torch files whose pickled code is never run.

Files are mapped into memory, so that what is not asked for (momentum parts, queues) is not read.
"""

import hashlib
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blip_core.errors import CheckpointError, WorkspaceError
from blip_core.files import read_json

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
# what torch's reader raises on torn files, besides its own refusal
MALFORMED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, OSError, struct.error)


def find_weights(folder: Path) -> list[Path]:
    """The weights' files of a folder as transformers writes it: one, or those that an index names; empty for none.

    Raises CheckpointError for an index that is torn or names a file that is not there.
    """
    for name in (SAFETENSORS, TORCH):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder / f"{name}.index.json")
    return []


def _indexed(index: Path) -> list[Path]:
    try:
        names = read_json(index)["weight_map"].values()
    except (WorkspaceError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of weights; expected an object with weight_map") from error
    files = sorted({index.parent / Path(str(name)).name for name in names})
    if missing := [file for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(files)} files are missing, such as {missing[0].name}"
        )
    return files


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """All weights of the files, on the CPU. Raises CheckpointError naming the file that is torn or no such file."""
    return {name: tensor for file in files for name, tensor in _read(file).items()}


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix != ".safetensors":
        return _state_dict(path, read_torch(path))
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def read_torch(path: Path) -> Any:
    """What a torch file holds, as long as that is tensors and plain values. No code in it is run.

    Raises CheckpointError for one that is torn, that is no torch file, or that holds anything else.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start != ZIP and start[:1] != PICKLE:
        found = repr(start) if start else "nothing"
        raise CheckpointError(f"{path}: not a torch file (it begins with {found}); expected what torch.save writes")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refusal(str(error))}") from error
    except MALFORMED as error:
        raise CheckpointError(f"{path}: torn, or not a torch file ({first_line(error)})") from error


def _refusal(message: str) -> str:
    """Why torch would not unpickle: its own message, which recommends to run the code, is not passed on."""
    if found := re.search(r"GLOBAL (\S+)", message):
        return (
            f"holds pickled code ({found[1]}), which is not run; expected tensors and plain values alone. Whoever "
            'trusts the file can load it elsewhere and save {"model": its state dict} with torch.save'
        )
    return "a pickle that torch.save did not write, or a torn one; expected a state dict, as torch.save writes it"


def _state_dict(path: Path, saved: Any) -> dict[str, Tensor]:
    inner = saved["model"] if isinstance(saved, dict) and isinstance(saved.get("model"), dict) else saved
    named = isinstance(inner, dict) and all(isinstance(name, str) for name in inner)
    if not named or not inner or not all(isinstance(tensor, Tensor) for tensor in inner.values()):
        raise CheckpointError(f"{path}: holds no state dict, neither bare nor under 'model'")
    return inner


def digest(files: Iterable[Path]) -> str:
    """16 hexadecimal digits that identify the files' bytes."""
    sha256 = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                sha256.update(part)
    return sha256.hexdigest()[:16]


def standing_digest(files: Sequence[Path]) -> str:
    """The same of files that stay as they are: in one process they are read once, as long as size and time are kept."""
    stats = [file.stat() for file in files]
    return _kept_digest(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)))


@lru_cache(maxsize=16)
def _kept_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    return digest(path for path, _, _ in files)


def first_line(error: Exception) -> str:
    """What an error says first; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
