"""What can be said about a configuration before anything is started: the user's tables, predicate and checkpoints."""

from collections.abc import Callable
from pathlib import Path

from blip_core.config import BootstrapConfig
from blip_core.corpus.verdicts import check_publish
from blip_core.data.tables import check_pair_table
from blip_core.data.web_rows import check_web_table
from blip_core.errors import ConfigError
from blip_core.med.architecture import Face
from blip_core.med.description import read_checkpoint_config
from blip_core.med.foreign import RELEASE_TOKENIZER
from blip_core.med.sources import locate
from blip_core.med.tokenizer import Tokenizer
from blip_core.workspace import Workspace
from tasks.models import device
from tasks.next_round import preview_round
from tasks.workplace import captioner_source, filter_source, human_pairs, tokenizer_source, workspace_of

Check = Callable[[BootstrapConfig], None]


def check_inputs(flow: str, config: BootstrapConfig, make_workspace: bool = True) -> None:
    """Raises InputError, ConfigError, CheckpointError or WorkspaceError for what the flow would fail at later."""
    for check in _CHECKS[flow]:
        check(config)
    if make_workspace:
        workspace_of(config)
    else:
        Workspace.preview(config.workspace)


def _web(config: BootstrapConfig) -> None:
    check_web_table(config.web)


def _human(config: BootstrapConfig) -> None:
    check_pair_table(human_pairs(config))


def _human_if_given(config: BootstrapConfig) -> None:
    if config.human is not None:
        _human(config)


def _held_out(config: BootstrapConfig) -> None:
    if config.held_out is not None:
        check_pair_table(config.held_out)


def _predicate(config: BootstrapConfig) -> None:
    check_publish(config.publish)


def _given_models(config: BootstrapConfig) -> None:
    _given_model(config, captioner_source(config), "decoder")
    _given_model(config, filter_source(config), "encoder")


def _given_model(config: BootstrapConfig, source: str | Path, face: Face) -> None:
    read_checkpoint_config(source, face)
    if locate(source).is_file():  # such a file has no tokenizer beside it
        Tokenizer.load(tokenizer_source(config, source) or RELEASE_TOKENIZER)


def _precision(config: BootstrapConfig) -> None:
    if config.annotate.precision == "int8" and device() != "cpu":
        raise ConfigError(f"annotate.precision: int8 is for CPUs, and this machine has {device()}; set bf16 or fp32")


def _both_given(config: BootstrapConfig) -> None:
    if config.checkpoints.captioner is None or config.checkpoints.filter is None:
        raise ConfigError(
            "clean: checkpoints.captioner and checkpoints.filter must both name a checkpoint, there or by --captioner "
            "and --filter"
        )


def _next_round(config: BootstrapConfig) -> None:
    """The human pairs where the next round trains anything, and the models where it trains none."""
    plan = preview_round(config, Workspace.preview(config.workspace))
    if plan.pretrains or plan.finetunes or config.rounds.retrain:
        _human(config)
    if not plan.finetunes:
        _given_models(plan.config)


_CHECKS: dict[str, tuple[Check, ...]] = {
    "bootstrap": (_web, _human, _held_out, _predicate, _precision),
    "re-bootstrap": (_precision, _predicate, _web, _human_if_given, _held_out, _next_round),
    # the models last: their files may have to be fetched
    "clean": (_both_given, _precision, _predicate, _web, _human_if_given, _given_models),
    "download": (_web,),
    "pretrain": (_human,),
    "finetune": (_human,),
    "annotate": (_precision,),
    "publish": (_human_if_given, _predicate),
    "retrain": (_human,),
    "evaluation": (_held_out,),
}
