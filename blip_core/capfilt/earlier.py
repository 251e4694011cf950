"""What earlier rounds have of CapFilt: annotation parts of the same models and settings, and the models themselves."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from blip_core.capfilt.parts import AnnotateConfig, ShardJob, standing_part
from blip_core.corpus.schemas import ANNOTATION_VERSION, CAPTIONER_KEY, FILTER_KEY
from blip_core.data.shards import check_part
from blip_core.errors import CheckpointError, ShardError
from blip_core.files import atomic_copy
from blip_core.med.decoding import GenerationConfig
from blip_core.med.description import CONFIG, read_checkpoint_config
from blip_core.workspace import Round, Workspace

Kind = Literal["captioner", "filter"]

KEYS = {"captioner": CAPTIONER_KEY, "filter": FILTER_KEY}


def take_over_parts(
    shards: Iterable[Path],
    target: Path,
    earlier: Sequence[Path],
    captioner: str,
    filter: str,
    config: AnnotateConfig,
    generation: GenerationConfig,
    seed: int,
) -> int:
    """Gives shards that have no part in `target` that of an earlier round, byte by byte; returns how many it gave.

    Args:
        target: the folder of the round's annotations.
        earlier: those of other rounds; the first that has such a part gives it.
        captioner, filter: digests of the models.

    A part of other models or settings is no such part, nor is one that is torn. What stands in `target` is left to the
    annotation, which makes it anew or complains.
    """
    taken = 0
    standing = _names(target)
    offered = [(folder, _names(folder)) for folder in earlier]
    for shard in (shard for shard in shards if shard.name not in standing):
        sources = [folder / shard.name for folder, names in offered if shard.name in names]
        whole = (
            part for part in sources if _is_whole(ShardJob(shard, part), captioner, filter, config, generation, seed)
        )
        if (source := next(whole, None)) is not None:
            atomic_copy(source, target / shard.name)
            taken += 1
    return taken


def find_model(workspace: Workspace, annotated: Round, kind: Kind) -> Path:
    """The folder of the Captioner or Filter whose work the annotations of a round are, whichever round trained it.

    Raises CheckpointError where the round has no annotations, or no round of the workspace has this model.
    """
    parts = sorted(annotated.annotations.glob("*.parquet"))
    if not parts:
        raise CheckpointError(
            f"{annotated.annotations}: round {annotated.number} has no annotations, which name their {kind}"
        )
    digest = check_part(parts[0], ANNOTATION_VERSION).get(KEYS[kind])
    for number in reversed(workspace.round_numbers()):
        folder = getattr(workspace.round(number), kind)
        if (folder / CONFIG).is_file() and read_checkpoint_config(folder)["digest"] == digest:
            return folder
    raise CheckpointError(
        f"round {annotated.number} was annotated by the {kind} {digest}, and no round of {workspace.root} has it; name "
        f"it by checkpoints.{kind}, or set rounds.finetune"
    )


def _is_whole(
    job: ShardJob, captioner: str, filter: str, config: AnnotateConfig, generation: GenerationConfig, seed: int
) -> bool:
    try:
        return standing_part(job, captioner, filter, config, generation, seed) is not None
    except ShardError:
        return False


def _names(folder: Path) -> set[str]:
    return {part.name for part in folder.glob("*.parquet")}
