"""Evaluating the trained models on the held-out pairs, and the corpus against the truth where it is known."""

from prefect import flow

from blip_core.config import BootstrapConfig
from tasks.evaluation import evaluate_round
from tasks.warned import counted_warnings


@flow(name="evaluation")
def evaluation(config: BootstrapConfig) -> None:
    """Measures retrieval and captioning of the trained models, and the noise of web and corpus."""
    with counted_warnings("evaluation"):
        evaluate_round(config)
