"""The deployment `annotate-batch/capfilt` with an annotator that only copies parts which were made before.

The flow is the project's own in all but the annotator: a run of it costs what orchestration costs. Deployed by
orchestration.py alone, in a server of its own.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from prefect import flow
from prefect.states import State

from blip_core.capfilt.parts import AnnotationSummary, FailedShard, Progress
from blip_core.config import BootstrapConfig
from blip_core.corpus.schemas import IMAGES_KEY, ROWS_KEY, UNSCORED_KEY
from blip_core.files import atomic_file
from flows.annotate_batch import annotate_here
from tasks.workplace import round_of, workspace_of

STOCK = "stock"  # the folder of the workspace with the parts


@flow(name="annotate-batch")
def annotate_batch(config: BootstrapConfig, names: list[str]) -> State[None]:
    """Puts the named shards' parts from the stock into place."""
    return annotate_here(config, names, copy_parts)


def copy_parts(
    config: BootstrapConfig, names: list[str], at: Progress | None = None
) -> Iterator[AnnotationSummary | FailedShard]:
    """An Annotator whose work is a copy."""
    stock = workspace_of(config).root / STOCK
    for name in names:
        made, part = round_of(config), f"{name}.parquet"
        _copy(stock / "embeddings" / part, made.embeddings / part)
        _copy(stock / "annotations" / part, made.annotations / part)
        yield _summary(made.annotations / part)


def _copy(source: Path, target: Path) -> None:
    with atomic_file(target) as temporary:
        temporary.write_bytes(source.read_bytes())


def _summary(target: Path) -> AnnotationSummary:
    described = pq.read_metadata(target).metadata
    images, rows, unscored = (int(described[key.encode()]) for key in (IMAGES_KEY, ROWS_KEY, UNSCORED_KEY))
    return AnnotationSummary(target.stem, images, rows, unscored, 0.0, 0.0, skipped=False)
