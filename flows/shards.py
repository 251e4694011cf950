"""One task call for each shard, a window of them at a time, or for each batch of shards.

Every call's end is checked. A shard that fails, after the retries of its task, does not hold up the others; the
step then fails with the names of all that failed.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

from prefect import Task
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from tasks import progress

_NAMED = 3


def threads(window: int) -> TaskRunner[PrefectFuture[Any]]:
    """The task runner of a flow that works on `window` shards at a time."""
    return cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=window))


def over_shards(
    step: str,
    shard_task: "Task[[BootstrapConfig, str], Any]",
    config: BootstrapConfig,
    names: list[str],
    window: int,
) -> list[Any]:
    """Calls `shard_task(config, name)` for every name, `window` at a time, and returns what they returned.

    The tasks say how far they are (`tasks.progress.at`). Raises CapfiltError that names the shards which failed, when
    all others are done.
    """
    results: list[Any] = []
    failures: dict[str, Exception] = {}
    for name, future in _windowed(lambda name: shard_task.submit(config, name), names, window):
        result = future.result(raise_on_failure=False)
        if future.state.is_completed():
            results.append(result)
        else:
            failures[name] = result
            progress.fail(step, name, result)
    complain(step, failures, len(names))
    return results


def over_batches(
    step: str,
    batch_task: "Task[[BootstrapConfig, list[str]], dict[str, CapfiltError]]",
    config: BootstrapConfig,
    names: list[str],
    size: int,
) -> None:
    """Calls `batch_task(config, names)` for `size` shards after the others; it returns the failures by shard.

    Raises as `over_shards` does; a batch that fails as a whole ends the step, for what failed is no single shard's.
    """
    failures: dict[str, Exception] = {}
    for start in range(0, len(names), size):
        batch = names[start : start + size]
        future = batch_task.submit(config, batch)
        result: Any = future.result(raise_on_failure=False)
        if not future.state.is_completed():
            complain(step, {**failures, **dict.fromkeys(names[start:], result)}, len(names))
        for name, failure in result.items():
            failures[name] = failure
            progress.fail(step, name, failure)
    complain(step, failures, len(names))


def _windowed(
    submit: Callable[[str], PrefectFuture[Any]], names: list[str], window: int
) -> Iterator[tuple[str, PrefectFuture[Any]]]:
    """Yields each name with its future as it ends; submits the next one then."""
    left = iter(names)
    running = {submit(name): name for name in islice(left, window)}
    while running:
        future = next(as_completed(list(running)))
        yield running.pop(future), future
        running |= {submit(name): name for name in islice(left, 1)}


def complain(step: str, failures: Mapping[str, Exception], total: int) -> None:
    """Raises CapfiltError that names the shards which failed, three of them with their cause; nothing without any."""
    if not failures:
        return
    named = "; ".join(f"{name}: {failure}" for name, failure in islice(failures.items(), _NAMED))
    more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
    raise CapfiltError(
        f"{step}: {len(failures)} of {total} shards failed, the others stand; the same command tries these again. "
        f"{named}{more}"
    ) from next(iter(failures.values()))
