"""Retraining: a MED from scratch on the corpus, and one with the same budget on the raw web pairs to compare with."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.training.run import TrainSummary
from tasks.curves import watch_training
from tasks.training_ray import train


@task(name="retrain-on-corpus", task_run_name="retrain-on-corpus", cache_policy=NO_CACHE)
def retrain_on_corpus(config: BootstrapConfig) -> TrainSummary:
    """Trains MED from scratch on the corpus and the human pairs; does nothing where it stands."""
    return train("retrained", config, watch_training("retrained", config))


@task(name="retrain-on-raw", task_run_name="retrain-on-raw", cache_policy=NO_CACHE)
def retrain_on_raw(config: BootstrapConfig) -> TrainSummary:
    """Trains the same MED for the same steps on the web pairs as found and the human pairs."""
    return train("retrained-raw", config, watch_training("retrained-raw", config))
