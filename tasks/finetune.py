"""Fine-tuning the Captioner and the Filter on human pairs, each from the same pre-trained MED."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.training.run import TrainSummary
from tasks.curves import watch_training
from tasks.training_ray import train


@task(name="finetune-captioner", task_run_name="finetune-captioner", cache_policy=NO_CACHE)
def finetune_captioner(config: BootstrapConfig) -> TrainSummary:
    """Fine-tunes the Captioner with LM; does nothing where it stands."""
    return train("captioner", config, watch_training("captioner", config))


@task(name="finetune-filter", task_run_name="finetune-filter", cache_policy=NO_CACHE)
def finetune_filter(config: BootstrapConfig) -> TrainSummary:
    """Fine-tunes the Filter with ITC and ITM; does nothing where it stands."""
    return train("filter", config, watch_training("filter", config))
