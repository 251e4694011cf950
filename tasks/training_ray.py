"""A training of a round on the configuration's engine: in this process, or in processes of a Ray cluster."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial

from blip_core import stores
from blip_core.cluster import connected, resources
from blip_core.config import BootstrapConfig
from blip_core.data.fetch import temporary_folder
from blip_core.evaluation.tables import read_metrics
from blip_core.training.on_ray import train_on_ray
from blip_core.training.run import TrainSummary
from blip_core.training.train import Progress
from tasks.training import recipe_of, train_model
from tasks.workplace import round_of, workspace_of

_SECONDS = 5.0


def train(model: str, config: BootstrapConfig, progress: Progress) -> TrainSummary:
    """Trains one of TRAININGS, unless it stands.

    Raises what the training raises, and with the engine `ray` what train_on_ray does.
    """
    if config.engine != "ray":
        return train_model(model, config, progress)
    workspace = workspace_of(config)
    with ExitStack() as stack:
        ray = stack.enter_context(connected(config.scale.ray_address))
        # Ray wants a folder that all nodes reach; where the workspace is none, they must be on one machine
        shared = not stores.is_remote(workspace.root)
        notes = stack.enter_context(temporary_folder(workspace.root / ".tmp", f"ray-{model}")) if shared else None
        stack.enter_context(_followed(model, config, progress))
        return train_on_ray(
            partial(train_model, model, config),
            config.scale.ray_workers,
            use_gpu=resources(ray, "GPU") > 0,
            storage=str(notes) if notes else None,
            restarts=config.scale.tries,
        )


@contextmanager
def _followed(model: str, config: BootstrapConfig, progress: Progress) -> Iterator[None]:
    """Within, the metrics file that the training writes elsewhere is followed, and the last step told."""
    metrics, steps = round_of(config).metrics, recipe_of(model, config).steps
    ended = threading.Event()

    def follow() -> None:
        told = 0
        while not ended.wait(_SECONDS):
            rows = read_metrics(metrics).get(model)
            if rows and rows[-1]["step"] > told:
                told = rows[-1]["step"]
                losses = {name: rows[-1][name] for name in ("itc", "itm", "lm") if rows[-1].get(name) is not None}
                progress(told, steps, losses)

    thread = threading.Thread(target=copy_context().run, args=(follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
