"""One task call for each shard, a window of them at a time, or for each batch of shards.

Every call's end is checked. A shard that fails, after the retries of its task, does not hold up the others; the
step then fails with the names of all that failed. Where there are very many shards every call is for a batch: a task
costs the server some rows and events, of which it loses those that come too fast.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar, cast

from prefect import Task
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from tasks import progress

Part = TypeVar("Part")
BatchTask = Task[[BootstrapConfig, list[str]], dict[str, CapfiltError]]

# Of a step. Each is some rows and events at the server, and a screen shows no more of them anyway.
MOST_TASKS = 400

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
    batch_task: BatchTask | None = None,
) -> None:
    """Calls `shard_task(config, name)` for every name, `window` at a time.

    The tasks say how far they are (`tasks.progress.at`). With more than MOST_TASKS names, `batch_task` is called as in
    `over_batches`. Raises CapfiltError that names the shards which failed, when all others are done.
    """
    if batch_task is not None and len(names) > MOST_TASKS:
        over_batches(step, batch_task, config, names, -(-len(names) // MOST_TASKS), window)
        return
    failures: dict[str, Exception] = {}
    for name, future in _windowed(lambda name: shard_task.submit(config, name), names, window):
        result = future.result(raise_on_failure=False)
        if not future.state.is_completed():
            failures[name] = result
            progress.fail(step, name, result)
    complain(step, failures, len(names))


def over_batches(
    step: str, batch_task: BatchTask, config: BootstrapConfig, names: list[str], size: int, window: int = 1
) -> None:
    """Calls `batch_task(config, names)` for `size` shards at a time; it returns the failures by shard.

    Raises as `over_shards` does; a batch that fails as a whole ends the step, for what failed is no single shard's.
    """
    failures: dict[str, Exception] = {}
    left = dict.fromkeys(names)
    batches = [tuple(names[start : start + size]) for start in range(0, len(names), size)]
    for batch, future in _windowed(lambda batch: batch_task.submit(config, list(batch)), batches, window):
        result: Any = future.result(raise_on_failure=False)
        if not future.state.is_completed():
            complain(step, {**failures, **dict.fromkeys(left, result)}, len(names))
        for name in batch:
            del left[name]
        failures |= result
        tell(step, result)
    complain(step, failures, len(names))


def tell(step: str, failures: Mapping[str, Exception]) -> None:
    """Says which shards failed, and why."""
    for name, failure in failures.items():
        progress.fail(step, name, failure)


def _windowed(
    submit: Callable[[Part], PrefectFuture[Any]], parts: Iterable[Part], window: int
) -> Iterator[tuple[Part, PrefectFuture[Any]]]:
    """Yields each part with its future as it ends; submits the next one then."""
    left = iter(parts)
    running = {submit(part): part for part in islice(left, window)}
    while running:
        future = next(as_completed(list(running)))
        yield running.pop(future), future
        running |= {submit(part): part for part in islice(left, 1)}


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
