"""What can be said about a configuration before anything is started: the user's tables, predicate and checkpoints."""

from collections.abc import Callable

from blip_core.config import BootstrapConfig
from blip_core.corpus.selection import check_predicate
from blip_core.data.tables import check_pair_table, read_web_table
from blip_core.errors import ConfigError
from blip_core.med.checkpoint import read_checkpoint_config
from tasks.workplace import captioner_folder, filter_folder, human_pairs, workspace_of

Check = Callable[[BootstrapConfig], None]


def check_inputs(flow: str, config: BootstrapConfig) -> None:
    """Raises InputError, ConfigError, CheckpointError or WorkspaceError for what the flow would fail at later."""
    for check in _CHECKS[flow]:
        check(config)
    workspace_of(config)


def _web(config: BootstrapConfig) -> None:
    read_web_table(config.web)


def _human(config: BootstrapConfig) -> None:
    check_pair_table(human_pairs(config))


def _human_if_given(config: BootstrapConfig) -> None:
    if config.human is not None:
        _human(config)


def _held_out(config: BootstrapConfig) -> None:
    if config.held_out is not None:
        check_pair_table(config.held_out)


def _predicate(config: BootstrapConfig) -> None:
    check_predicate(config.publish.where)


def _given_models(config: BootstrapConfig) -> None:
    read_checkpoint_config(captioner_folder(config), face="decoder")
    read_checkpoint_config(filter_folder(config), face="encoder")


def _both_given(config: BootstrapConfig) -> None:
    if config.checkpoints.captioner is None or config.checkpoints.filter is None:
        raise ConfigError("clean: checkpoints.captioner and checkpoints.filter must both name a checkpoint")


_CHECKS: dict[str, tuple[Check, ...]] = {
    "bootstrap": (_web, _human, _held_out, _predicate),
    "clean": (_both_given, _given_models, _web, _human_if_given, _predicate),
    "download": (_web,),
    "pretrain": (_human,),
    "finetune": (_human,),
    "annotate": (),
    "publish": (_human_if_given, _predicate),
    "retrain": (_human,),
    "evaluation": (_held_out,),
}
