"""CapFilt alone: a corpus from web pairs with a given Captioner and Filter, and no training."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.annotate import annotate
from flows.download import download
from flows.publish import publish


@flow(name="clean")
def clean(config: BootstrapConfig) -> None:
    """Downloads, annotates with `checkpoints.captioner` and `checkpoints.filter`, and publishes."""
    download(config)
    annotate(config)
    publish(config)
