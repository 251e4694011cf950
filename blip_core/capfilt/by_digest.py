"""The model of a digest: what annotations name is looked for in the rounds, or at the place that a person gives.

A checkpoint's config.json only says which digest its weights have; here they are read.
"""

from pathlib import Path
from typing import Any

from blip_core.capfilt.earlier import Kind
from blip_core.copies import local_copy
from blip_core.errors import CheckpointError
from blip_core.med.description import FORMAT, WEIGHTS, read_checkpoint_config
from blip_core.med.sources import locate, standing_digest
from blip_core.workspace import Workspace

# Whatever folder of a round: a MED that was pre-trained can be given as either.
FOLDERS = ("captioner", "filter", "med", "retrained", "retrained_raw")


def find_by_digest(workspace: Workspace, kind: Kind, digest: str, given: str | None = None) -> str | Path:
    """The source of the Captioner or Filter with this digest, for `Captioner.load` and `Filter.load`.

    Args:
        given: where it is; without it, the newest round that has it is taken.

    Raises CheckpointError where it is not there, where what is given has another digest, and where the weights are not
    those of the digest.
    """
    if given is not None:
        found = str(read_checkpoint_config(given)["digest"])
        if found != digest:
            raise CheckpointError(
                f"--{kind} {given}: its digest is {found}; the texts were made and judged with the {kind} {digest}"
            )
        _check_weights(given, digest)
        return given
    if (folder := folder_of(workspace, digest)) is not None:
        _check_weights(folder, digest)
        return folder
    raise CheckpointError(
        f"no round of {workspace.root} has the {kind} {digest}, with which the texts were made and judged; name its "
        f"checkpoint by --{kind} SRC"
    )


def folder_of(workspace: Workspace, digest: str) -> Path | None:
    """The folder of the newest round whose checkpoint says that it has this digest; None where none does."""
    rounds = map(workspace.round, reversed(workspace.round_numbers()))
    folders = (getattr(made, name) for made in rounds for name in FOLDERS)
    return next((folder for folder in folders if _config(folder).get("digest") == digest), None)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_checkpoint_config(folder) if folder.exists() else {}
    except CheckpointError:
        return {}  # a torn one is not the one that is looked for, and no reason not to look on


def _check_weights(source: str | Path, digest: str) -> None:
    """Of a checkpoint of this project; that of any other is taken from its weights already."""
    folder = local_copy(locate(source))
    weights = folder / WEIGHTS
    if read_checkpoint_config(folder).get("format", FORMAT) != FORMAT or not weights.is_file():
        return
    if (found := standing_digest([weights])) != digest:
        raise CheckpointError(
            f"{weights}: has the digest {found}, and config.json beside it says {digest}; it is not what it was"
        )
