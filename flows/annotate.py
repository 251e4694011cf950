"""CapFilt: synthetic texts and scores for every image of every shard."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.shards import over_shards, threads
from tasks.annotate import annotate_shard
from tasks.workplace import shard_names

# One shard at a time: the models fill the device.
_WINDOW = 1


@flow(name="annotate", task_runner=threads(_WINDOW))
def annotate(config: BootstrapConfig) -> None:
    """Captions and scores the images of every shard with the Captioner and the Filter."""
    over_shards("annotate", annotate_shard, config, shard_names(config), _WINDOW)
