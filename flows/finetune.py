"""Fine-tuning the Captioner and the Filter on human pairs."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.pool import in_pool
from tasks.finetune import finetune_captioner, finetune_filter
from tasks.warned import counted_warnings


@flow(name="finetune")
def finetune(config: BootstrapConfig) -> None:
    """Fine-tunes the pre-trained MED twice: into the Captioner and into the Filter."""
    if in_pool("finetune", config):
        return
    with counted_warnings("finetune"):
        finetune_captioner(config)
        finetune_filter(config)
