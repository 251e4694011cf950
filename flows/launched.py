"""One training in the process at hand, which accelerate, torchrun or nobody has launched; no Prefect server."""

from typing import TYPE_CHECKING

from blip_core.errors import ConfigError
from blip_core.training import processes
from flows.terminal import TerminalDisplay
from tasks.progress import TrainingProgress
from tasks.training import TRAININGS, recipe_of, train_model

if TYPE_CHECKING:
    from blip_core.config import BootstrapConfig


def train_here(model: str, config: "BootstrapConfig") -> None:
    """Trains one model of the round, unless it stands; the first process shows the progress on stderr.

    Raises ConfigError for a model that there is not, and what the training raises.
    """
    if model not in TRAININGS:
        raise ConfigError(f"train {model}: no such model; it is one of {', '.join(TRAININGS)}")
    with TerminalDisplay() as display:
        steps = TrainingProgress(model, recipe_of(model, config).batch_size, display.show)
        summary = train_model(model, config, steps)
        if processes.is_first():
            state = "stands" if summary.skipped else f"trained in {summary.seconds:.0f} s"
            display.say(f"{model}: {state}, digest {summary.digest}")
