"""The engine `pool` of the annotation: batches of shards as child runs, a window of them open at a time.

What was done is read from the disk, not from the runs: a shard is done when its part stands.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import UUID

from prefect.client.schemas.objects import FlowRun

from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from flows.annotate_batch import reasons
from flows.pool import SHARDS_FAILED, ChildRuns, told
from flows.shards import complain
from tasks import progress
from tasks.annotate import AnnotationPlan, add_work, preview_annotation
from tasks.workplace import round_of, workspace_of

# A shared file system shows a new file to other machines after a while.
_SETTLE_SECONDS = 60.0
# Between looks at which parts stand, to show how far the open runs are.
_COUNT_SECONDS = 30.0


def annotate_in_pool(config: BootstrapConfig, plan: AnnotationPlan) -> bool:
    """Annotates the missing shards of the plan in the children's work pool.

    False: this run has a place in that pool itself, and is to annotate here. Raises CapfiltError that names the shards
    which failed, when all others are done, and ConfigError as ChildRuns does.
    """
    if not plan.missing:
        return True
    runs = ChildRuns("annotate", "annotate-batch", config)
    if runs.hold_this_run():
        progress.say(
            f"annotate: this run is in the work pool {runs.pool} itself and annotates alone; to share the work out, "
            "run it from another pool or from the command line"
        )
        return False
    _Conductor(config, plan, runs).run()
    return True


class _Conductor:
    """Hands out the batches and takes their ends."""

    def __init__(self, config: BootstrapConfig, plan: AnnotationPlan, runs: ChildRuns) -> None:
        self.config = config
        self.plan = plan
        self.runs = runs
        self.failures: dict[str, Exception] = {}
        self.broken = ""  # what failed as a whole, and not for the sake of a shard
        self.batches: dict[UUID, list[str]] = {run.id: run.parameters["names"] for run in runs.adopt()}
        self._parts = round_of(config).annotations
        self._old = self._standing()  # parts of other models or settings, which are no progress
        self._counted = time.monotonic()

    def run(self) -> None:
        adopted = {name for names in self.batches.values() for name in names}
        if self.batches:
            progress.say(f"annotate: {len(self.batches)} runs of an earlier conductor are open; they are waited for")
        left = self._cut([name for name in self.plan.names if name not in adopted])
        while self._hand_out(left) or self.runs.open:
            for run in self.runs.look():
                self._end(run)
            self._count()
        for names in left:
            self.failures |= dict.fromkeys(names, CapfiltError(f"was not tried, as {self.broken}"))
        complain("annotate", self.failures, len(self.plan.missing))

    def _cut(self, names: list[str]) -> Iterator[list[str]]:
        size = self.config.scale.shards_per_run
        return (names[start : start + size] for start in range(0, len(names), size))

    def _hand_out(self, left: Iterator[list[str]]) -> bool:
        """Fills the window; False when there is nothing to hand out, or what failed would fail for every batch."""
        while not self.broken and len(self.runs.open) < self.config.scale.window:
            names = next(left, None)
            if names is None:
                return False
            run = self.runs.submit(f"annotate-{names[0]}", {"names": names})
            self.batches[run.id] = names
        return not self.broken

    def _end(self, run: FlowRun) -> None:
        """Takes what the run made; the shards that it did not make have failed, unless it goes on."""
        found = preview_annotation(self.config, workspace_of(self.config), self.batches[run.id])
        said = reasons(run.state.message) if run.state is not None and run.state.name == SHARDS_FAILED else {}
        if _came_to_its_end(run) and self._wait_for(run, found.missing.keys() - said.keys()):
            return
        made = {name: images for name, images in found.standing.items() if name in self.plan.missing}
        for name, images in made.items():
            progress.at("annotate", name, images)
        add_work(self.config, run.total_run_time.total_seconds(), sum(made.values()))
        for name in found.missing:
            self._fail(name, said.get(name, f"its run {run.name} {told(run)}"))
        if found.missing and run.state is not None and run.state.is_failed() and not _came_to_its_end(run):
            self.broken = f"run {run.name} {told(run)}"
        progress.say(f"run {run.name}: {len(made)} shards, {sum(made.values())} images")

    def _wait_for(self, run: FlowRun, parts: set[str]) -> bool:
        """Whether parts that are not there, and of which the run says that it made them, may still come."""
        if not parts:
            return False
        if _age(run) < _SETTLE_SECONDS:
            self.runs.open[run.id] = run
            return True
        return self.runs.put_back(run, f"has ended, and {len(parts)} parts that it says it has made are not there")

    def _fail(self, name: str, why: str) -> None:
        self.failures[name] = CapfiltError(why)
        progress.fail("annotate", name, self.failures[name])

    def _count(self) -> None:
        """Shows the shards that open runs have done so far."""
        if time.monotonic() - self._counted < _COUNT_SECONDS:
            return
        self._counted = time.monotonic()
        new = self._standing() - self._old
        for id in self.runs.open:
            for name in new.intersection(self.batches[id]):
                progress.at("annotate", name, self.plan.missing.get(name, 0))

    def _standing(self) -> set[str]:
        return {path.stem for path in self._parts.glob("*.parquet")}


def _came_to_its_end(run: FlowRun) -> bool:
    """Whether the run tried each of its shards."""
    return run.state is not None and (run.state.is_completed() or run.state.name == SHARDS_FAILED)


def _age(run: FlowRun) -> float:
    """Seconds since the run ended."""
    return 0.0 if run.end_time is None else (datetime.now(UTC) - run.end_time).total_seconds()
