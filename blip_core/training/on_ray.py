"""A training on a Ray cluster: every worker of Ray Train's TorchTrainer is one process of it.

Ray brings the workers up and their process group; data, saved states and checkpoint stay the training's own, so what
comes out is what `accelerate launch` would give.
"""

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from blip_core.cluster import connected
from blip_core.errors import CapfiltError, TrainingError
from blip_core.training.run import TrainSummary

Training = Callable[[], TrainSummary]


def train_on_ray(
    training: Training,
    workers: int,
    *,
    use_gpu: bool = False,
    address: str = "local",
    storage: str | None = None,
    restarts: int = 0,
) -> TrainSummary:
    """Trains with one process in each of so many Ray workers, and returns the first one's summary.

    Args:
        training: with all its arguments, as `functools.partial(pretrain, target, ...)`. It is pickled, and its paths
            must lead to the same files on every node.
        workers: 1 or more.
        use_gpu: give each worker a GPU, and NCCL between them; otherwise a CPU core, and gloo.
        address: of the cluster; "auto" finds the one that runs here or that RAY_ADDRESS names, "local" begins one on
            this machine for this training. A process that is connected to a cluster stays with that.
        storage: folder or URL that all nodes reach, for Ray Train's own notes; None: a folder of this machine, which
            is enough where all workers are on it.
        restarts: how often a training whose workers failed is begun again, from its last saved state.

    Raises ConfigError as `connected` does, and TrainingError where the cluster is too small, or a worker died; an error
    of the training itself comes out as it is.
    """
    with ExitStack() as stack:
        ray = stack.enter_context(connected(address, workers))
        _check_room(ray.cluster_resources(), workers, use_gpu)
        storage = storage or stack.enter_context(tempfile.TemporaryDirectory(prefix="capfilt-ray-"))
        return _fit(training, workers, use_gpu, storage, restarts)


def _check_room(there: Mapping[str, float], workers: int, use_gpu: bool) -> None:
    """Raises TrainingError where Ray would wait for ever."""
    kind = "GPU" if use_gpu else "CPU"
    if there.get(kind, 0) < workers:
        raise TrainingError(
            f"workers: {workers} workers need a {kind} each, and the Ray cluster has {there.get(kind, 0):g}; "
            "add nodes, or take fewer workers"
        )


def _fit(training: Training, workers: int, use_gpu: bool, storage: str, restarts: int) -> TrainSummary:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        partial(_train_here, training, use_gpu),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(
            storage_path=storage,
            failure_config=FailureConfig(max_failures=restarts),
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
    )
    try:
        summary, said = trainer.fit().return_value
    except TrainingFailedError as error:
        failures = dict(sorted(getattr(error, "worker_failures", {}).items()))
        for failure in failures.values():
            if isinstance(failure, CapfiltError):
                raise failure from None
        causes = [f"worker {rank}: {_first_line(failure)}" for rank, failure in failures.items()]
        raise TrainingError(f"training on Ray: {'; '.join(causes) or _first_line(error)}") from error
    for warning in said:
        warnings.warn(warning, stacklevel=3)
    return summary


def _train_here(training: Training, use_gpu: bool) -> tuple[TrainSummary, list[UserWarning]]:
    """In a worker: the training, and what it warned of, which the worker's own output would hide."""
    if not use_gpu:
        # Ray will not always hide the GPUs from a worker that has none, and accelerate takes what it sees
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with warnings.catch_warnings(record=True) as said:
        summary = training()
    return summary, [warning.message for warning in said if isinstance(warning.message, UserWarning)]


def _first_line(error: Exception) -> str:
    error = getattr(error, "health_check_failure", error)  # Ray's word for a worker that it cannot reach any more
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
