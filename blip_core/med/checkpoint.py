"""Checkpoints: a folder of model.safetensors, config.json and the tokenizer. Loading is strict, and runs no code.

The digest identifies the model by its weights and sizes; annotations record it.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from blip_core.errors import CheckpointError, ConfigError, WorkspaceError
from blip_core.files import atomic_folder, read_json, write_json
from blip_core.med.med import MED, Architecture, architecture_from, build_med
from blip_core.med.tokenizer import Tokenizer

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class LoadedMED(NamedTuple):
    """A MED as it was saved, in evaluation mode."""

    med: MED
    tokenizer: Tokenizer
    digest: str
    architecture: Architecture
    config: dict[str, Any]


def save_med(folder: Path, med: MED, architecture: Architecture, tokenizer: Tokenizer, origin: dict[str, Any]) -> str:
    """Writes a checkpoint in one atomic step and returns its digest.

    Args:
        folder: its final name; a checkpoint that stands there is replaced.
        origin: what made it (JSON-like): settings, data, seed, fingerprint. Kept in config.json.
    """
    with atomic_folder(folder) as temporary:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in med.state_dict().items()}
        save_file(weights, temporary / WEIGHTS)
        tokenizer.save(temporary)
        digest = _digest(temporary / WEIGHTS)
        config = {"med": asdict(architecture), "vocabulary": len(tokenizer), "digest": digest, **origin}
        write_json(temporary / CONFIG, config)
    return digest


def load_med(folder: Path, device: str | torch.device = "cpu") -> LoadedMED:
    """Reads a checkpoint.

    Raises CheckpointError, naming the file and the keys, where the folder or a file is missing, the weights are
    torn, or their names or shapes are not those of the recorded sizes.
    """
    config = read_checkpoint_config(folder)
    try:
        architecture = architecture_from(config["med"])
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG}: does not describe a MED ({error})") from error
    tokenizer = Tokenizer.load(folder)
    med = build_med(architecture, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id)
    weights = _read_weights(folder / WEIGHTS)
    _check_shapes(folder / WEIGHTS, weights, med)
    med.load_state_dict(weights)
    return LoadedMED(med.to(device).eval(), tokenizer, config["digest"], architecture, config)


def read_checkpoint_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint. Raises CheckpointError where there is none, or one that describes no MED."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"checkpoint {folder}: not found; expected a folder with {WEIGHTS} and {CONFIG}")
    try:
        config = read_json(folder / CONFIG)
    except WorkspaceError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(config, dict) or not {"med", "digest"} <= config.keys():
        raise CheckpointError(f"{folder / CONFIG}: does not describe a MED; it must be an object with med and digest")
    return config


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def _check_shapes(path: Path, weights: dict[str, torch.Tensor], med: MED) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in med.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{path}: {len(missing)} weights are missing, the first is {missing[0]}")
    if unexpected := sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{path}: {len(unexpected)} weights are unknown, the first is {unexpected[0]}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{path}: {name} has shape {found[name]}; {CONFIG} promises {shape}")


def _digest(path: Path) -> str:
    with path.open("rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()[:16]
