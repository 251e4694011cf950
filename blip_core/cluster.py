"""A Ray cluster: this process connected to it for a while, and what the cluster has. Ray is the extra `ray`."""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from blip_core.errors import ConfigError

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # a relative path means the same in the workers as here
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # how long Ray waits for workers that wait for one which has failed
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
}


@contextmanager
def connected(address: str, cores: int = 1) -> Iterator[Any]:
    """Yields the module `ray`, connected to a cluster; a process that is connected already stays with its own.

    Args:
        address: of the cluster; "auto" finds the one that runs here or that RAY_ADDRESS names, "local" begins one on
            this machine, with `cores` cores at least, which ends with the block.

    Raises ConfigError where Ray is missing, or there is no cluster.
    """
    with _contained(ENVIRONMENT):
        ray = _import_ray()
        if ray.is_initialized():
            yield ray
            return
        _connect(ray, address, cores)
        try:
            yield ray
        finally:
            ray.shutdown()


def resources(ray: Any, kind: str) -> int:
    """How many GPUs or CPUs (Ray's names of the two kinds) the cluster has now."""
    return int(ray.cluster_resources().get(kind, 0))


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        missing = error.name or error
        raise ConfigError(f"Ray: {missing} is not installed; pip install capfilt[ray]") from error
    return ray


def _connect(ray: Any, address: str, cores: int) -> None:
    own: dict[str, Any] = {"runtime_env": {"env_vars": ENVIRONMENT}}
    if address == "local":
        # more workers than cores are slow, not wrong; Ray would wait for the cores for ever
        own = {"num_cpus": max(cores, os.cpu_count() or 1), "include_dashboard": False}
    try:
        # what Ray's own actors print is not ours
        ray.init(address, logging_level="ERROR", log_to_driver=False, **own)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"Ray: no cluster at {address!r} ({error})") from error


@contextmanager
def _contained(defaults: Mapping[str, str]) -> Iterator[None]:
    """Within, environment variables that were not set have these values; after it, Ray's handler of Ctrl-C is gone."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    handler = signal.getsignal(signal.SIGINT)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
