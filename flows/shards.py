"""One task call for each shard, a window of them at a time.

Every call's end is checked. A shard that fails, after the retries of its task, does not hold up the others; the
step then fails with the names of all that failed.
"""

from collections.abc import Callable, Iterator
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
    standing: int = 0,
) -> list[Any]:
    """Calls `shard_task(config, name)` for every name, `window` at a time, and returns what they returned.

    `standing` counts the shards that were done before, for the display. Raises CapfiltError that names the shards
    which failed, when all others are done.
    """
    results: list[Any] = []
    failures: dict[str, Exception] = {}
    total = len(names) + standing
    for name, future in _windowed(lambda name: shard_task.submit(config, name), names, window):
        result = future.result(raise_on_failure=False)
        if future.state.is_completed():
            results.append(result)
        else:
            failures[name] = result
            progress.say(f"{step}: shard {name} failed: {result}")
        progress.show(step, standing + len(results), total, f"{len(failures)} failed" if failures else "")
    if failures:
        raise CapfiltError(_complaint(step, failures, total)) from next(iter(failures.values()))
    return results


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


def _complaint(step: str, failures: dict[str, Exception], total: int) -> str:
    named = "; ".join(f"{name}: {failure}" for name, failure in islice(failures.items(), _NAMED))
    more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
    return (
        f"{step}: {len(failures)} of {total} shards failed, the others stand; the same command tries these again. "
        f"{named}{more}"
    )
