"""CapFilt: synthetic texts and scores for every image of every shard."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.annotate_pool import annotate_in_pool
from flows.shards import complain, over_batches, tell, threads
from tasks import progress
from tasks.annotate import plan_annotation
from tasks.annotate_batch import annotate_batch
from tasks.annotate_ray import annotate_on_ray
from tasks.warned import counted_warnings

# Shards of a task. One task at a time: the models fill the device.
_BATCH = 16


@flow(name="annotate", task_runner=threads(1))
def annotate(config: BootstrapConfig) -> None:
    """Captions and scores the images of every shard with the Captioner and the Filter, on the chosen engine."""
    with counted_warnings("annotate"):
        plan = plan_annotation(config)
        progress.begin("annotate", plan.images + plan.standing_images, plan.standing_images)
        if config.engine == "pool" and annotate_in_pool(config, plan):
            return
        if config.engine == "ray" and plan.missing:
            failures = annotate_on_ray(config, plan.names)
            tell("annotate", failures)
            complain("annotate", failures, len(plan.missing))
        else:
            over_batches("annotate", annotate_batch, config, plan.names, _BATCH)
