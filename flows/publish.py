"""Publishing the corpus: what predicate and rules keep, and the human pairs."""

from prefect import flow

from blip_core.config import BootstrapConfig
from blip_core.corpus.rules import looks_across
from flows.shards import over_shards, threads
from tasks import progress
from tasks.publish import build_catalog, compare_images, publish_batch, publish_human, publish_shard
from tasks.warned import counted_warnings
from tasks.workplace import shard_names

_WINDOW = 2


@flow(name="publish", task_runner=threads(_WINDOW))
def publish(config: BootstrapConfig) -> None:
    """Writes the candidates that pass predicate and rules and the human pairs, and the catalog to query them."""
    with counted_warnings("publish"):
        names = shard_names(config)
        progress.begin("publish", len(names), unit="shards")
        if looks_across(config.publish.images):
            compare_images(config)
        over_shards("publish", publish_shard, config, names, _WINDOW, publish_batch)
        if config.human is not None:
            publish_human(config)
        build_catalog(config)
