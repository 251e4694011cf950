"""What earlier rounds have of CapFilt: annotation parts of the same models and settings, and the models themselves."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from blip_core.capfilt.embeddings import embeddings_stand
from blip_core.capfilt.parts import AnnotateConfig, ShardJob, annotated_part
from blip_core.corpus.models import Kind, find_checkpoint
from blip_core.corpus.schemas import ANNOTATION_VERSION, CAPTIONER_KEY, FILTER_KEY
from blip_core.data.shards import check_part
from blip_core.errors import CheckpointError, ShardError
from blip_core.files import atomic_copy
from blip_core.med.decoding import GenerationConfig
from blip_core.workspace import Round, Workspace

KEYS = {"captioner": CAPTIONER_KEY, "filter": FILTER_KEY}


def take_over_parts(
    shards: Iterable[Path],
    target: Round,
    earlier: Sequence[Round],
    captioner: str,
    filter: str,
    config: AnnotateConfig,
    generation: GenerationConfig,
    seed: int,
) -> int:
    """Gives shards that have no annotations in `target` those of an earlier round, byte by byte, and the embeddings.

    Args:
        earlier: the first of these rounds that has such a part gives it.
        captioner, filter: digests of the models.

    Returns how many shards got annotations. A part of other models or settings is no such part, nor is one that is
    torn. Where no round has the embeddings, the annotation makes them. What stands in `target` is left to the
    annotation, which makes it anew or complains.
    """
    taken = 0
    standing = _names(target.annotations)
    offered = [(made, _names(made.annotations), _names(made.embeddings)) for made in earlier]
    settings = (captioner, filter, config, generation, seed)
    for shard in (shard for shard in shards if shard.name not in standing):
        jobs = [ShardJob.of(made, shard) for made, names, _ in offered if shard.name in names]
        source = next((job.target for job in jobs if _is_whole(annotated_part, job, *settings)), None)
        if source is None:
            continue
        stored = [made.embeddings / shard.name for made, _, names in offered if shard.name in names]
        vectors = next((part for part in stored if _is_whole(embeddings_stand, part, filter, config.precision)), None)
        if vectors is not None:
            atomic_copy(vectors, target.embeddings / shard.name)
        atomic_copy(source, target.annotations / shard.name)
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
    folder = find_checkpoint(workspace, kind, digest)
    if folder is not None:
        return folder
    raise CheckpointError(
        f"round {annotated.number} was annotated by the {kind} {digest}, and no round of {workspace.root} has it; name "
        f"it by checkpoints.{kind}, or set rounds.finetune"
    )


def _is_whole(stands: Callable[..., object], *job: object) -> bool:
    """Whether a part stands, as `stands` tells of it; a torn one does not."""
    try:
        return bool(stands(*job))
    except ShardError:
        return False


def _names(folder: Path) -> set[str]:
    return {part.name for part in folder.glob("*.parquet")}
