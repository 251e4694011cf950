"""Retraining: a MED from scratch on the corpus, and one with the same budget on the raw web pairs to compare with."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.data.pairs import corpus_sources, human_source, web_sources
from blip_core.training import pretrain
from blip_core.training.run import TrainSummary
from tasks import progress
from tasks.workplace import add_seconds, human_pairs, round_of, workspace_of


@task(name="retrain-on-corpus", task_run_name="retrain-on-corpus", cache_policy=NO_CACHE)
def retrain_on_corpus(config: BootstrapConfig) -> TrainSummary:
    """Trains MED from scratch on the corpus and the human pairs; does nothing where it stands."""
    current = round_of(config)
    summary = pretrain.pretrain(
        current.retrained,
        [*corpus_sources(current.corpus, workspace_of(config).shards), human_source(human_pairs(config))],
        config.med,
        config.retrain,
        config.tokenizer,
        config.seed,
        current.metrics / "retrained.jsonl",
        progress.training("retrained"),
    )
    if not summary.skipped:
        add_seconds(config, "retrain", summary.seconds)
    return summary


@task(name="retrain-on-raw", task_run_name="retrain-on-raw", cache_policy=NO_CACHE)
def retrain_on_raw(config: BootstrapConfig) -> TrainSummary:
    """Trains the same MED for the same steps on the web pairs as found and the human pairs."""
    current = round_of(config)
    summary = pretrain.pretrain(
        current.retrained_raw,
        [*web_sources(workspace_of(config).shard_paths()), human_source(human_pairs(config))],
        config.med,
        config.retrain,
        config.tokenizer,
        config.seed,
        current.metrics / "retrained-raw.jsonl",
        progress.training("retrained-raw"),
    )
    if not summary.skipped:
        add_seconds(config, "retrain_raw", summary.seconds)
    return summary
