"""Weights on disk: safetensors, or torch files whose pickled code is never run.

Files are mapped into memory, so that what is not asked for (momentum parts, queues) is not read.
"""

import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blip_core.errors import CheckpointError, first_line

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
# what torch's reader raises on torn files, besides its own refusal
MALFORMED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, OSError, struct.error)


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
