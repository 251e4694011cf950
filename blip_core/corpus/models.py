"""Which checkpoint of a workspace a digest belongs to."""

from pathlib import Path
from typing import Literal

from blip_core.med.description import CONFIG, read_checkpoint_config
from blip_core.workspace import Workspace

Kind = Literal["captioner", "filter"]


def find_checkpoint(workspace: Workspace, kind: Kind, digest: str | None) -> Path | None:
    """The folder of the Captioner or Filter with that digest, whichever round trained it; None where none has it."""
    for number in reversed(workspace.round_numbers()):
        folder = getattr(workspace.round(number), kind)
        if (folder / CONFIG).is_file() and read_checkpoint_config(folder)["digest"] == digest:
            return folder
    return None
