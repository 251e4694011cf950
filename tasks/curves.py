"""A training under way, for whoever watches: how far and how fast, and on the run's page its losses by step."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blip_core.config import BootstrapConfig
from blip_core.evaluation.charts import loss_curve
from blip_core.evaluation.tables import read_metrics
from blip_core.training.train import Progress
from blip_core.workspace import Round
from tasks import progress
from tasks.artifacts import Cell, show_markdown, show_table
from tasks.training import recipe_of
from tasks.workplace import round_of

CURVE_SECONDS = 30.0
TABLE_ROWS = 40


def watch_training(model: str, config: BootstrapConfig) -> Progress:
    """What the training of `model` calls after every step with (done, total, losses); to be used within a run."""
    steps = progress.TrainingProgress(model, recipe_of(model, config).batch_size)
    curve = LossCurve(model, round_of(config))

    def after_step(done: int, total: int, losses: Mapping[str, float]) -> None:
        steps(done, total, losses)
        curve.refresh(ended=done == total)

    return after_step


class LossCurve:
    """The artifacts `loss-<model>`, a picture, and `metrics-<model>`, a table: twice a minute, and at the end."""

    def __init__(self, model: str, round: Round, clock: Callable[[], float] = time.monotonic) -> None:
        self.model = model
        self.round = round
        self._clock = clock
        self._last = clock()

    def refresh(self, ended: bool) -> None:
        """Draws what the metrics file says so far, where that is due; nothing while it says nothing."""
        if not ended and self._clock() - self._last < CURVE_SECONDS:
            return
        rows = read_metrics(self.round.metrics).get(self.model)
        if rows:
            described = f"{self.model}, round {self.round.number}, step {rows[-1]['step']:,}"
            picture = f"![losses of {self.model} by step]({loss_curve(self.model, rows)})"
            show_markdown(f"loss-{self.model}", picture, f"Losses of {described}", hurried=not ended)
            show_table(f"metrics-{self.model}", metrics_table(rows), f"Metrics of {described}", hurried=not ended)
        self._last = self._clock()


def metrics_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Cell]]:
    """At most TABLE_ROWS of the rows, evenly spread and the last one first; without what was not measured."""
    last = len(rows) - 1
    places = {round(place * last / (TABLE_ROWS - 1)) for place in range(TABLE_ROWS)}
    chosen = [rows[place] for place in sorted(places, reverse=True)]
    names = [name for name in rows[-1] if name != "model" and any(row.get(name) is not None for row in chosen)]
    return [{name.replace("_", " "): _shown(row.get(name)) for name in names} for row in chosen]


def _shown(value: Any) -> Cell:
    return f"{value:.4g}" if isinstance(value, float) else value
