"""Child runs in a Prefect work pool: handed out, looked at, and put back where they died.

`run_deployment` neither raises what a child raises nor tells of a child that died: here each child's own state is read.
The children outlive a conductor that is killed; the next one with the same work adopts those that are still open.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse, SetStateStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run as this_run
from prefect.states import AwaitingRetry

from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError, ConfigError
from blip_core.files import fingerprint
from flows.automations import RERUN_TAG
from tasks import progress

Answer = TypeVar("Answer")

# How long the automation that puts back runs with RERUN_TAG goes first.
_AUTOMATION_SECONDS = 60.0
# The state of a run whose other shards are done; another try would end the same.
SHARDS_FAILED = "ShardsFailed"

_API_SECONDS = 300.0  # a server that restarts, or its database, is away for less
_QUIET_SECONDS = 60.0
# Longer with every time that a run is put back. A worker must have put the last process of a run away before.
_PAUSE_SECONDS = 20.0
# The worker is busy with a crashed run for a while (see flows.automations), and takes runs 10 s before their time.
_REST_SECONDS = 40.0
_OPEN = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]


class ChildRuns:
    """The runs of one deployment that work for this flow run, and those that are open.

    Args:
        step: the step of the cycle, for what is said.
        flow: the name of the flow whose deployment `<flow>/capfilt` is run.
        config: of this run; the children get it with the engine `local`.

    Raises ConfigError where the server has no such deployment, or this has no work pool.
    """

    def __init__(self, step: str, flow: str, config: BootstrapConfig) -> None:
        self.step = step
        self.deployment = _deployment(f"{flow}/capfilt")
        self.pool = str(self.deployment.work_pool_name)
        self.open: dict[UUID, FlowRun] = {}
        self._name = f"{flow}/capfilt"
        self._scale = config.scale
        self._config = config.model_copy(update={"engine": "local"}).model_dump(mode="json")
        self.tag = f"capfilt-{fingerprint(flow, config.model_dump(mode='json', exclude={'engine', 'scale'}))}"
        self._put_back: Counter[UUID] = Counter()
        self._quiet_since = time.monotonic()

    def hold_this_run(self) -> bool:
        """Whether this run itself, or the run that it is a part of, has a place in the children's work pool.

        It must not wait for another place there: in a pool with one place it would wait for ever.
        """
        root = this_run.root_flow_run_id
        return root is not None and _ask(lambda client: client.read_flow_run(UUID(root))).work_pool_name == self.pool

    def adopt(self) -> list[FlowRun]:
        """The open runs of the same work, which an earlier conductor submitted; they count as this one's now."""
        wanted = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[self.tag]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_OPEN)),
        )
        runs = _ask(lambda client: client.read_flow_runs(flow_run_filter=wanted))
        self.open |= {run.id: run for run in runs}
        return runs

    def submit(self, name: str, parameters: Mapping[str, Any] | None = None) -> FlowRun:
        """Submits one more run, a part of this one: who cancels this one cancels it."""
        key = f"{self.tag}-{uuid4()}"  # so that a request whose answer was lost does not make two runs
        run = _patiently(
            lambda: cast(
                "FlowRun",
                run_deployment(
                    self._name,
                    parameters={"config": self._config, **(parameters or {})},
                    timeout=0,
                    flow_run_name=name,
                    tags=[self.tag],
                    idempotency_key=key,
                ),
            )
        )
        self.open[run.id] = run
        return run

    def look(self) -> list[FlowRun]:
        """Waits for a while, and returns the runs that have ended for good; those that died are put back."""
        time.sleep(self._scale.poll_seconds)
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=list(self.open)))
        runs = _ask(lambda client: client.read_flow_runs(flow_run_filter=wanted))
        self._warn_of_an_empty_pool(runs)
        deleted = [self.open[id] for id in self.open.keys() - {run.id for run in runs}]
        ended = [run for run in runs if self._is_over(run)] + deleted
        for run in ended:
            del self.open[run.id]
        return ended

    def put_back(self, run: FlowRun, why: str) -> bool:
        """Lets a run that has ended be run again, `scale.tries` times at most. False: it has had them all."""
        if self._put_back[run.id] >= self._scale.tries:
            return False
        rest = _REST_SECONDS if run.state is not None and run.state.is_crashed() else 0.0
        pause = timedelta(seconds=max(rest, _PAUSE_SECONDS * self._put_back[run.id]))
        state: Any = AwaitingRetry(scheduled_time=datetime.now(UTC) + pause)
        answer = _ask(lambda client: client.set_flow_run_state(run.id, state))
        if answer.status == SetStateStatus.ACCEPT:
            self._put_back[run.id] += 1
            count = f"{self._put_back[run.id]} of {self._scale.tries}"
            progress.say(f"{self.step}: run {run.name} {why}; it is put back, time {count}")
        self.open[run.id] = run
        return True

    def _is_over(self, run: FlowRun) -> bool:
        state = run.state
        if state is None or not state.is_final():
            return False
        if state.is_completed() or state.is_cancelled() or state.name == SHARDS_FAILED:
            return True
        age = (datetime.now(UTC) - state.timestamp).total_seconds()
        if state.is_crashed() and RERUN_TAG in run.tags and age < _AUTOMATION_SECONDS:
            return False
        return not self.put_back(run, told(run))

    def _warn_of_an_empty_pool(self, runs: list[FlowRun]) -> None:
        """Says once a minute that runs wait and nobody takes them."""
        if any(run.state is not None and run.state.type != StateType.SCHEDULED for run in runs):
            self._quiet_since = time.monotonic()
        if not runs or time.monotonic() - self._quiet_since < _QUIET_SECONDS:
            return
        self._quiet_since = time.monotonic()
        workers = _ask(lambda client: client.read_workers_for_work_pool(self.pool))
        online = sum(worker.status == WorkerStatus.ONLINE for worker in workers)
        why = (
            f"its {online} workers are busy, or the pool or its queue is paused or full"
            if online
            else f"no worker of it is online; start one: prefect worker start --pool {self.pool}"
        )
        progress.say(f"{self.step}: {len(runs)} runs wait in the work pool {self.pool}: {why}")


def told(run: FlowRun) -> str:
    """How a run ended: its state, and the state's message."""
    state = run.state
    if state is None or not state.is_final():
        return "is gone; it was deleted"
    message = " ".join((state.message or "").split())
    return f"{state.type.value.lower()}{f' ({message})' if message else ''}"


def in_pool(step: str, config: BootstrapConfig) -> bool:
    """Runs a whole step as one child run in its own work pool, where the configuration says `engine: pool`.

    False: the step is to be done here, because another engine does it or this run is in that pool already. Raises
    CapfiltError where the child failed or was cancelled, or died more than `scale.tries` times; ConfigError as
    ChildRuns does.
    """
    if config.engine != "pool":
        return False
    runs = ChildRuns(step, step, config)
    if runs.hold_this_run():
        return False
    run = next(iter(runs.adopt()), None) or runs.submit(step)
    progress.say(f"{step}: run {run.name} in the work pool {runs.pool}")
    while runs.open:
        for run in runs.look():
            if run.state is None or not run.state.is_completed():
                raise CapfiltError(f"{step}: run {run.name} {told(run)}")
    return True


def _deployment(name: str) -> DeploymentResponse:
    try:
        found = _ask(lambda client: client.read_deployment_by_name(name))
    except ObjectNotFound as error:
        raise ConfigError(
            f"engine: pool needs the deployment {name} on the Prefect server, which has none; set PREFECT_API_URL to a "
            "server that has it, or register it: capfilt setup-prefect"
        ) from error
    if found.work_pool_name is None:
        raise ConfigError(f"engine: pool: the deployment {name} has no work pool; register it: capfilt setup-prefect")
    return found


def _ask(question: Callable[[SyncPrefectClient], Answer]) -> Answer:
    """What the Prefect server answers, as `_patiently` does."""

    def ask() -> Answer:
        with get_client(sync_client=True) as client:
            return question(client)

    return _patiently(ask)


def _patiently(call: Callable[[], Answer]) -> Answer:
    """What a call returns, tried again while the Prefect server or its database is away, for some minutes."""
    began = time.monotonic()
    pause = 1.0
    while True:
        try:
            return call()
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            if time.monotonic() - began > _API_SECONDS:
                raise CapfiltError(
                    f"the Prefect server does not answer for {_API_SECONDS:.0f} s ({error!r})"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 15.0)
