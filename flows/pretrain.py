"""Pre-training MED on web and human pairs."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.pool import in_pool
from tasks.pretrain import pretrain_med
from tasks.warned import counted_warnings


@flow(name="pretrain")
def pretrain(config: BootstrapConfig) -> None:
    """Pre-trains MED with ITC, ITM and LM on the shards and the human pairs."""
    if in_pool("pretrain", config):
        return
    with counted_warnings("pretrain"):
        pretrain_med(config)
