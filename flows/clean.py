"""CapFilt alone: a corpus from web pairs with a given Captioner and Filter, and no training."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.annotate import annotate
from flows.download import download
from flows.publish import publish
from flows.report import report


@flow(name="clean")
def clean(config: BootstrapConfig) -> None:
    """Downloads, annotates with `checkpoints.captioner` and `checkpoints.filter`, publishes, and reports."""
    download(config)
    annotate(config)
    publish(config)
    report(config)
