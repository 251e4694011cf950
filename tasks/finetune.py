"""Fine-tuning the Captioner and the Filter on human pairs, each from the same pre-trained MED."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.data.pairs import human_source
from blip_core.training import finetune
from blip_core.training.run import TrainSummary
from tasks import progress
from tasks.workplace import add_seconds, human_pairs, round_of


@task(name="finetune-captioner", task_run_name="finetune-captioner", cache_policy=NO_CACHE)
def finetune_captioner(config: BootstrapConfig) -> TrainSummary:
    """Fine-tunes the Captioner with LM; does nothing where it stands."""
    current = round_of(config)
    summary = finetune.finetune_captioner(
        current.captioner,
        current.med,
        [human_source(human_pairs(config))],
        config.captioner,
        config.seed,
        current.metrics / "captioner.jsonl",
        progress.training("captioner"),
    )
    if not summary.skipped:
        add_seconds(config, "finetune_captioner", summary.seconds)
    return summary


@task(name="finetune-filter", task_run_name="finetune-filter", cache_policy=NO_CACHE)
def finetune_filter(config: BootstrapConfig) -> TrainSummary:
    """Fine-tunes the Filter with ITC and ITM; does nothing where it stands."""
    current = round_of(config)
    summary = finetune.finetune_filter(
        current.filter,
        current.med,
        [human_source(human_pairs(config))],
        config.filter,
        config.seed,
        current.metrics / "filter.jsonl",
        progress.training("filter"),
    )
    if not summary.skipped:
        add_seconds(config, "finetune_filter", summary.seconds)
    return summary
