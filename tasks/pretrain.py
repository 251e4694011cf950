"""Pre-training MED on the web pairs, as found, and the human pairs."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.data.pairs import human_source, web_sources
from blip_core.training import pretrain
from blip_core.training.run import TrainSummary
from tasks import progress
from tasks.workplace import add_seconds, human_pairs, round_of, workspace_of


@task(name="pretrain-med", task_run_name="pretrain-med", cache_policy=NO_CACHE)
def pretrain_med(config: BootstrapConfig) -> TrainSummary:
    """Trains MED from scratch with ITC, ITM and LM; does nothing where it stands."""
    current = round_of(config)
    summary = pretrain.pretrain(
        current.med,
        [*web_sources(workspace_of(config).shard_paths()), human_source(human_pairs(config))],
        config.med,
        config.pretrain,
        config.tokenizer,
        config.seed,
        current.metrics / "med.jsonl",
        progress.training("med"),
    )
    if not summary.skipped:
        add_seconds(config, "pretrain", summary.seconds)
    return summary
