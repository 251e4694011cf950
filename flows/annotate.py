"""CapFilt: synthetic texts and scores for every image of every shard."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.shards import over_batches, threads
from tasks.annotate import annotate_batch
from tasks.workplace import shard_names

# Shards of a task. One task at a time: the models fill the device.
_BATCH = 16


@flow(name="annotate", task_runner=threads(1))
def annotate(config: BootstrapConfig) -> None:
    """Captions and scores the images of every shard with the Captioner and the Filter."""
    over_batches("annotate", annotate_batch, config, shard_names(config), _BATCH)
