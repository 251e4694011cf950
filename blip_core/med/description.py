"""What a checkpoint says of itself: config.json, read before any of its weights, and without torch."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from blip_core.copies import local_copy
from blip_core.errors import CheckpointError, WorkspaceError
from blip_core.files import read_json
from blip_core.med.architecture import FACES, WITHOUT, Face
from blip_core.med.sources import EXPECTED, locate

WEIGHTS, CONFIG, DATA = "model.safetensors", "config.json", "data.json"
FORMAT = "capfilt"


def read_checkpoint_config(source: str | Path, face: Face | None = None) -> dict[str, Any]:
    """What a checkpoint says of itself: med (sizes), faces, vocabulary, digest; config.json of one of this project.

    Raises CheckpointError where there is none, one that describes no MED, or one without the face that is needed.
    """
    path = locate(source)
    config = own_config(path)
    if config is None:
        from blip_core.med.checkpoint import describe_foreign  # by its weights, which torch reads

        config = describe_foreign(local_copy(path))
    check_face(source, config["faces"], face)
    return config


def check_face(source: str | Path, faces: Collection[str], face: Face | None) -> None:
    """Raises CheckpointError where a checkpoint lacks the face that is needed; None: none is."""
    if face is not None and face not in faces:
        raise CheckpointError(f"checkpoint {source}: has no text {face}; it can {WITHOUT[face]}")


def own_config(path: Path) -> dict[str, Any] | None:
    """config.json of a checkpoint of this project; None for what others wrote.

    Raises CheckpointError for one that describes no MED, and where the weights are not beside it.
    """
    if path.is_file():
        return None
    values = config_values(path)
    if values.get("model_type") == "blip":
        return None
    if "model_type" in values:
        raise CheckpointError(f"{path / CONFIG}: a model of type {values['model_type']!r}; {EXPECTED}")
    if missing := {"med", "faces", "vocabulary", "digest"} - values.keys():
        raise CheckpointError(f"{path / CONFIG}: does not describe a MED; it has no {', '.join(sorted(missing))}")
    if not isinstance(values["faces"], list) or not any(face in values["faces"] for face in FACES):
        raise CheckpointError(f"{path / CONFIG}: faces is {values['faces']}; expected some of {', '.join(FACES)}")
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"checkpoint {path}: no {WEIGHTS}; expected it beside {CONFIG}")
    return values


def config_values(folder: Path) -> dict[str, Any]:
    """What config.json holds, whoever wrote it. Raises CheckpointError where there is none, or it holds no object."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"checkpoint {folder}: no {CONFIG}; expected a folder with {CONFIG} and {WEIGHTS}")
    try:
        values = read_json(folder / CONFIG)
    except WorkspaceError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / CONFIG}: does not describe a MED; it must be an object")
    return values
