"""Pre-training MED on the web pairs, as found, and the human pairs."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.training.run import TrainSummary
from tasks.curves import watch_training
from tasks.training_ray import train


@task(name="pretrain-med", task_run_name="pretrain-med", cache_policy=NO_CACHE)
def pretrain_med(config: BootstrapConfig) -> TrainSummary:
    """Trains MED with ITC, ITM and LM; does nothing where it stands."""
    return train("med", config, watch_training("med", config))
