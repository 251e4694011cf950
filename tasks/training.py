"""The trainings of a round, by the name of the model that they make.

Plain functions of the configuration, without Prefect: a task runs one, and so does each process of a launch by
accelerate or torchrun.
"""

from collections.abc import Callable

from blip_core.config import BootstrapConfig
from blip_core.data.denied import read_denied, refuse_denied
from blip_core.data.pairs import corpus_sources, human_source, web_sources
from blip_core.training.finetune import finetune_captioner, finetune_filter
from blip_core.training.pretrain import pretrain
from blip_core.training.recipe import TrainConfig
from blip_core.training.run import TrainSummary
from blip_core.training.train import Progress
from tasks.workplace import add_seconds, finetune_start, human_pairs, round_of, workspace_of

Training = Callable[[BootstrapConfig, Progress | None], TrainSummary]


def train_model(model: str, config: BootstrapConfig, progress: Progress | None = None) -> TrainSummary:
    """Trains one of TRAININGS, unless it stands; the first process keeps the account of its seconds."""
    step, training = TRAININGS[model]
    refuse_denied(human_pairs(config), read_denied(workspace_of(config)))
    summary = training(config, progress)
    if not summary.skipped and summary.main:
        add_seconds(config, step, summary.seconds)
    return summary


def recipe_of(model: str, config: BootstrapConfig) -> TrainConfig:
    """The settings by which one of TRAININGS is trained."""
    recipes = {"med": config.pretrain, "captioner": config.captioner, "filter": config.filter}
    return recipes.get(model, config.retrain)


def _med(config: BootstrapConfig, progress: Progress | None) -> TrainSummary:
    return _from_scratch("med", config, config.pretrain, progress)


def _retrained(config: BootstrapConfig, progress: Progress | None) -> TrainSummary:
    return _from_scratch("retrained", config, config.retrain, progress)


def _retrained_raw(config: BootstrapConfig, progress: Progress | None) -> TrainSummary:
    return _from_scratch("retrained-raw", config, config.retrain, progress)


def _from_scratch(model: str, config: BootstrapConfig, train: TrainConfig, progress: Progress | None) -> TrainSummary:
    """On the corpus for `retrained`, on the web pairs as found for the others; always on the human pairs too."""
    current, workspace = round_of(config), workspace_of(config)
    targets = {"med": current.med, "retrained": current.retrained, "retrained-raw": current.retrained_raw}
    web = (
        corpus_sources(current.corpus, workspace.shards)
        if model == "retrained"
        else web_sources(workspace.shard_paths())
    )
    return pretrain(
        targets[model],
        [*web, human_source(human_pairs(config))],
        config.med,
        train,
        config.tokenizer,
        config.seed,
        current.metrics / f"{model}.jsonl",
        progress,
        config.round,
    )


def _captioner(config: BootstrapConfig, progress: Progress | None) -> TrainSummary:
    current = round_of(config)
    sources = [human_source(human_pairs(config))]
    metrics = current.metrics / "captioner.jsonl"
    return finetune_captioner(
        current.captioner,
        finetune_start(config),
        sources,
        config.captioner,
        config.seed,
        metrics,
        progress,
        config.round,
    )


def _filter(config: BootstrapConfig, progress: Progress | None) -> TrainSummary:
    current = round_of(config)
    sources = [human_source(human_pairs(config))]
    metrics = current.metrics / "filter.jsonl"
    return finetune_filter(
        current.filter, finetune_start(config), sources, config.filter, config.seed, metrics, progress, config.round
    )


TRAININGS: dict[str, tuple[str, Training]] = {
    "med": ("pretrain", _med),
    "captioner": ("finetune_captioner", _captioner),
    "filter": ("finetune_filter", _filter),
    "retrained": ("retrain", _retrained),
    "retrained-raw": ("retrain_raw", _retrained_raw),
}
