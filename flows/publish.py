"""Publishing the corpus: what the predicate keeps, and the human pairs."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.shards import over_shards, threads
from tasks import progress
from tasks.publish import build_catalog, publish_batch, publish_human, publish_shard
from tasks.warned import counted_warnings
from tasks.workplace import shard_names

_WINDOW = 2


@flow(name="publish", task_runner=threads(_WINDOW))
def publish(config: BootstrapConfig) -> None:
    """Writes the candidates that pass the predicate and the human pairs, and the catalog to query them."""
    with counted_warnings("publish"):
        names = shard_names(config)
        progress.begin("publish", len(names), unit="shards")
        over_shards("publish", publish_shard, config, names, _WINDOW, publish_batch)
        if config.human is not None:
            publish_human(config)
        build_catalog(config)
