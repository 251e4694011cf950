"""Retraining MED on the corpus, and on the raw web pairs to compare with."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.pool import in_pool
from tasks.retrain import retrain_on_corpus, retrain_on_raw
from tasks.warned import counted_warnings


@flow(name="retrain")
def retrain(config: BootstrapConfig) -> None:
    """Trains a MED from scratch on the corpus, and one with the same budget on the raw web pairs."""
    if in_pool("retrain", config):
        return
    with counted_warnings("retrain"):
        retrain_on_corpus(config)
        if config.compare_raw:
            retrain_on_raw(config)
