"""Some shards, annotated by one run with the models loaded once: what the engine `pool` hands out."""

from collections.abc import Mapping

from prefect import flow
from prefect.states import Completed, Failed, State

from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from flows.pool import SHARDS_FAILED
from tasks import progress
from tasks.annotate import Annotator, preview_annotation, show_shard, work_through
from tasks.warned import counted_warnings
from tasks.workplace import workspace_of

_REASON = 300  # characters of a shard's failure that the state's message keeps


@flow(name="annotate-batch")
def annotate_batch(config: BootstrapConfig, names: list[str]) -> State[None]:
    """Captions and scores the images of the named shards; those that stand are not annotated again.

    Args:
        config: of the annotation that they are a part of.
        names: the shards, by the stems of their files.
    """
    from tasks.annotate_batch import annotate_names  # brings torch, which a conductor of such runs has no use for

    with counted_warnings("annotate"):
        return annotate_here(config, names, annotate_names)


def annotate_here(config: BootstrapConfig, names: list[str], annotator: Annotator) -> State[None]:
    """The state that the run ends in: where shards failed, its message has a line for each (`reasons` reads them)."""
    plan = preview_annotation(config, workspace_of(config), names)
    progress.begin("annotate", plan.images + plan.standing_images, plan.standing_images)
    if plan.missing:
        failures = work_through(config, annotator(config, plan.names, show_shard), account=False)
        if failures:
            return Failed(name=SHARDS_FAILED, message=_message(failures))
    return Completed(message=f"{plan.images} images in {len(plan.missing)} shards")


def _message(failures: Mapping[str, CapfiltError]) -> str:
    return "\n".join(f"{name}: {' '.join(str(failure).split())[:_REASON]}" for name, failure in failures.items())


def reasons(message: str | None) -> dict[str, str]:
    """Why shards failed, by shard, from the message of a run's state."""
    pairs = (line.partition(": ") for line in (message or "").splitlines())
    return {name: reason for name, _, reason in pairs}
