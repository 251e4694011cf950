"""Checkpoints: a folder of model.safetensors, config.json and the tokenizer. Loading is strict, and runs no code.

BLIP checkpoints of others are read as well (`foreign.py`). The digest identifies the model by its weights;
annotations record it.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from blip_core.copies import local_copy
from blip_core.errors import CheckpointError, ConfigError
from blip_core.files import atomic_folder, write_json
from blip_core.med.architecture import FACES, Architecture, Face, MEDConfig, architecture_from
from blip_core.med.description import CONFIG, DATA, FORMAT, WEIGHTS, check_face, config_values, own_config
from blip_core.med.foreign import Stored, read_release, read_transformers
from blip_core.med.image_encoder import resize_positions
from blip_core.med.med import MED, build_med
from blip_core.med.sources import digest, locate
from blip_core.med.tokenizer import Tokenizer
from blip_core.med.weights import read_weights
from blip_core.med.word_pieces import FILES, TokenizerConfig

MOST, MOST_LAYERS = 1_000_000, 1_000  # of any size, far above what there is
POSITIONS = "image_encoder.vit.pos_embed"


class LoadedMED(NamedTuple):
    """A MED as it was saved, in evaluation mode."""

    med: MED
    tokenizer: Tokenizer
    digest: str
    architecture: Architecture
    config: dict[str, Any]


def save_med(
    folder: Path,
    med: MED,
    architecture: Architecture,
    tokenizer: Tokenizer,
    origin: dict[str, Any],
    seen: dict[str, Any] | None = None,
) -> str:
    """Writes a checkpoint in one atomic step and returns its digest.

    Args:
        folder: its final name; a checkpoint that stands there is replaced.
        origin: what made it (JSON-like): settings, data, seed, fingerprint. Kept in config.json.
        seen: the record of the data that it was trained on (JSON-like), for data.json.
    """
    with atomic_folder(folder, marker=CONFIG) as temporary:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in med.state_dict().items()}
        save_file(weights, temporary / WEIGHTS)
        tokenizer.save(temporary)
        if seen is not None:
            write_json(temporary / DATA, seen)
        made = digest([temporary / WEIGHTS])
        write_json(temporary / CONFIG, {**_description(architecture, med.faces, len(tokenizer), made), **origin})
    return made


def load_med(
    source: str | Path,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
    tokenizer: str | Path | None = None,
    face: Face | None = None,
) -> LoadedMED:
    """Reads a checkpoint: of this project, of transformers' BLIP, or of the original release.

    Args:
        source: a folder; a .pth file of the release; either of them in an object store, or a name on the hub
            (owner/name), whose files are fetched.
        image_size: side of the images to come, in pixels; positions are interpolated to it. None: the checkpoint's.
        tokenizer: a folder or name that replaces the checkpoint's own; the release's files have none, and are read
            with bert-base-uncased if nothing else is given.
        face: what the model is needed for.

    Raises CheckpointError, naming the file and the keys, where something is missing, torn, unknown, of another size or
    another model, and where the face is not there; ConfigError for an image size that the patches do not divide.
    """
    stored, config = _read(source)
    check_face(source, stored.faces, face)
    _check_sizes(stored)
    architecture = _resized(stored.architecture, image_size)
    words = _tokenizer(source, stored, tokenizer)
    with torch.device("meta"):
        med = build_med(architecture, stored.vocabulary, words.encode_id, words.decode_id, stored.faces)
    med.load_state_dict(_fitting(stored, med), assign=True)
    return LoadedMED(med.to(device).eval(), words, stored.digest, architecture, config)


def _description(architecture: Architecture, faces: tuple[Face, ...], vocabulary: int, digest: str) -> dict[str, Any]:
    return {"med": asdict(architecture), "faces": list(faces), "vocabulary": vocabulary, "digest": digest}


def _read(source: str | Path) -> tuple[Stored, dict[str, Any]]:
    path = local_copy(locate(source))
    config = own_config(path)
    return _read_foreign(path) if config is None else (_read_own(path, config), config)


def _read_own(folder: Path, config: dict[str, Any]) -> Stored:
    try:
        architecture = architecture_from(config["med"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: does not describe a MED ({error})") from error
    return Stored(
        origin=folder / WEIGHTS,
        format=FORMAT,
        architecture=architecture,
        faces=tuple(face for face in FACES if face in config["faces"]),
        vocabulary=config["vocabulary"],
        weights={name: (name, tensor) for name, tensor in read_weights([folder / WEIGHTS]).items()},
        digest=config["digest"],
        tokenizer=folder,
        tokens={},
    )


def describe_foreign(path: Path) -> dict[str, Any]:
    """What `read_checkpoint_config` says of a checkpoint that others wrote, a folder or a file here."""
    return _read_foreign(path)[1]


def _read_foreign(path: Path) -> tuple[Stored, dict[str, Any]]:
    stored = read_release(path) if path.is_file() else read_transformers(path, config_values(path))
    description = _description(stored.architecture, stored.faces, stored.vocabulary, stored.digest)
    return stored, {**description, "format": stored.format}


def _check_sizes(stored: Stored) -> None:
    """Raises CheckpointError for sizes that no model can have, before one is built."""
    for name, value in asdict(stored.architecture).items():
        whole = name not in ("drop_path", "dropout")
        limit = MOST_LAYERS if name.endswith("depth") else MOST
        fits = (
            isinstance(value, int) and 1 <= value <= limit
            if whole
            else isinstance(value, int | float) and 0 <= value < 1
        )
        if isinstance(value, bool) or not fits:
            raise CheckpointError(
                f"{stored.origin}: {name} is {value!r}, expected {f'1 to {limit}' if whole else '0 to 1'}"
            )
    try:
        MEDConfig(**asdict(stored.architecture)).architecture()
    except ConfigError as error:
        raise CheckpointError(f"{stored.origin}: {error}") from error


def _resized(architecture: Architecture, image_size: int | None) -> Architecture:
    if image_size is None:
        return architecture
    if image_size < 1 or image_size % architecture.patch_size:
        raise ConfigError(f"image size {image_size}: must be a multiple of the patch size {architecture.patch_size}")
    return replace(architecture, image_size=image_size)


def _tokenizer(source: str | Path, stored: Stored, given: str | Path | None) -> Tokenizer:
    """The checkpoint's tokenizer, or the given one, if the model has its words."""
    wanted = given or stored.tokenizer
    if wanted is None:
        raise CheckpointError(
            f"checkpoint {source}: has no {' or '.join(FILES)}; expected one of them there, or a tokenizer to be named "
            "(that of the published BLIP models is bert-base-uncased)"
        )
    words = Tokenizer.load(wanted)
    if stored.format != FORMAT and words.max_tokens >= stored.weights["text.positions.weight"][1].shape[0]:
        # BERT's own limit, which says nothing of captions
        words = Tokenizer.load(wanted, TokenizerConfig().max_tokens)
    if len(words) != stored.vocabulary:
        lacked = f", with {' and '.join(words.added)}, which it lacked" if words.added else ""
        raise CheckpointError(
            f"tokenizer {wanted}: {len(words)} words{lacked}; expected the {stored.vocabulary} of the model in {source}"
        )
    for token, expected in stored.tokens.items():
        if (found := words.pieces.convert_tokens_to_ids(token)) != expected:
            raise CheckpointError(f"tokenizer {wanted}: {token} is token {found}; in the model of {source} {expected}")
    return words


def _fitting(stored: Stored, med: MED) -> dict[str, Tensor]:
    """The weights as the model takes them: whole, of its shapes, in float32, positions of its image size."""
    expected = {name: tuple(tensor.shape) for name, tensor in med.state_dict().items()}
    side = stored.architecture.image_size // stored.architecture.patch_size
    expected[POSITIONS] = (1, 1 + side**2, stored.architecture.image_width)
    _check_shapes(stored, expected)
    # copies: what was read is mapped from the file
    weights = {name: tensor.to(torch.float32, copy=True) for name, (_, tensor) in stored.weights.items()}
    wanted = med.image_size // stored.architecture.patch_size
    return {**weights, POSITIONS: resize_positions(weights[POSITIONS], wanted)}


def _check_shapes(stored: Stored, expected: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(expected.keys() - stored.weights.keys()):
        raise CheckpointError(f"{stored.origin}: {len(missing)} weights are missing, the first is {missing[0]}")
    if unknown := sorted(stored.weights.keys() - expected.keys()):
        raise CheckpointError(f"{stored.origin}: {len(unknown)} weights are unknown, the first is {unknown[0]}")
    for name, shape in expected.items():
        theirs, tensor = stored.weights[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{stored.origin}: {theirs} has shape {tuple(tensor.shape)}; expected {shape}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{stored.origin}: {theirs} holds {tensor.dtype}; expected floating-point numbers")
