"""One shard after the other within one task: where there are very many, a task for each would cost too much."""

from collections.abc import Callable, Iterable

from blip_core.errors import CapfiltError


def each_of(names: Iterable[str], work: Callable[[str], object]) -> dict[str, CapfiltError]:
    """Calls `work` for every name and returns the failures by name; a shard that fails does not hold up the others."""
    failures: dict[str, CapfiltError] = {}
    for name in names:
        try:
            work(name)
        except CapfiltError as failure:
            failures[name] = failure
    return failures
