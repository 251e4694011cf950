"""The whole cycle of BLIP (figure 3 of the paper): from noisy web pairs to a corpus and a model trained on it."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.annotate import annotate
from flows.download import download
from flows.evaluation import evaluation
from flows.finetune import finetune
from flows.pretrain import pretrain
from flows.publish import publish
from flows.report import report
from flows.retrain import retrain


@flow(name="bootstrap")
def bootstrap(config: BootstrapConfig) -> None:
    """Runs one round; whatever stands already is not made again."""
    download(config)
    pretrain(config)
    finetune(config)
    annotate(config)
    publish(config)
    retrain(config)
    evaluation(config)
    report(config)
