"""The next round of a workspace: its number, and the models that it is made with. Imports no Prefect."""

from dataclasses import asdict, replace
from typing import NamedTuple

from blip_core.capfilt.earlier import find_model
from blip_core.config import BootstrapConfig
from blip_core.corpus import rounds
from blip_core.corpus.models import Kind
from blip_core.errors import CheckpointError
from blip_core.med.description import CONFIG
from blip_core.workspace import Workspace


class RoundPlan(NamedTuple):
    """A round to be made: its configuration, which trainings its models need, and whether it was judged already."""

    config: BootstrapConfig
    pretrains: bool
    finetunes: bool
    judged: bool


def preview_round(config: BootstrapConfig, workspace: Workspace, run: str | None = None) -> RoundPlan:
    """What `re-bootstrap` would make, with nothing written; outside of Prefect.

    The Captioner and the Filter are those of `checkpoints`, else the promoted round's, else to be trained. Raises
    CheckpointError where the promoted round's models are asked for and cannot be had.
    """
    number = rounds.choose_round(workspace, run)
    made = workspace.round(number)
    begun = rounds.read_begun(made)
    promoted = begun.promoted if begun is not None else rounds.promoted_round(workspace)
    verdict = rounds.read_verdict(made) or {}
    # What another run has judged is made sure of and judged anew, but for what may be promoted: its promotion is due.
    judged = bool(verdict) and (verdict["passed"] is True or verdict["run"] == run)
    config = config.model_copy(update={"round": number})
    if config.checkpoints.captioner is not None and config.checkpoints.filter is not None:
        return RoundPlan(config, False, False, judged)
    if promoted is None or promoted == number:
        return RoundPlan(config, True, True, judged)
    if config.rounds.finetune:
        _check_retrained(workspace, promoted)
        return RoundPlan(config, False, True, judged)
    return RoundPlan(_with_models_of(promoted, config, workspace), False, False, judged)


def _with_models_of(promoted: int, config: BootstrapConfig, workspace: Workspace) -> BootstrapConfig:
    given = asdict(config.checkpoints)
    kinds: tuple[Kind, ...] = ("captioner", "filter")
    models = {kind: str(find_model(workspace, workspace.round(promoted), kind)) for kind in kinds if not given[kind]}
    return config.model_copy(update={"checkpoints": replace(config.checkpoints, **models)})


def _check_retrained(workspace: Workspace, promoted: int) -> None:
    folder = workspace.round(promoted).retrained
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: not found; rounds.finetune begins with the MED that was retrained on the promoted round's "
            f"corpus: run `capfilt retrain CONFIG.yaml --round {promoted}`, and keep rounds.retrain set"
        )
