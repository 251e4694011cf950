"""What Prefect does by itself when a process dies: a dead run is noticed, and put back for a worker to take again.

The automations are found by their names, so that setting them up twice makes nothing twice. A run that is put back
keeps its parameters, and what stands in its workspace is not made again. Crash after crash comes to an end: a run is
put back RERUNS times at most, and one that crashes before it starts once in ten minutes.
Every deployment has the tag `capfilt`; only those with the tag `rerun` as well are put back.
"""

from collections.abc import Iterable, Mapping
from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

TAG, RERUN_TAG = "capfilt", "rerun"
# What the deployments set as PREFECT_FLOWS_HEARTBEAT_FREQUENCY; Prefect sends none more often.
HEARTBEAT_SECONDS = 30
HEARTBEATS_MISSED = 3
START_SECONDS = 180
RERUNS = 5
# A worker is busy with a run that has crashed until it has loaded the flow once more, to ask for its hooks; one with a
# --limit that is given the same run before that ends with an error.
REST_SECONDS = 30
# The state of a run that crashed before it ran: no count of its starts says how often that was.
_NEVER_STARTED = "NeverStarted"
# Longer than it takes to crash so again: the second time in a row is not answered, and so is the last.
_NEVER_STARTED_PERIOD = timedelta(minutes=10)

_STARTS = ("Running", "Retrying")
# After these nobody need be at work on the run, until the next start.
_ENDS = ("Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Paused", "Suspended")
_WAITS = ("Scheduled", "Late", "AwaitingRetry", "AwaitingConcurrencySlot", "Resuming")


def ensure_automations(
    client: SyncPrefectClient,
    silence_s: float = HEARTBEATS_MISSED * HEARTBEAT_SECONDS,
    start_s: float = START_SECONDS,
    rest_s: float = REST_SECONDS,
    reruns: int = RERUNS,
) -> list[str]:
    """Makes the automations that are missing and updates those that differ; returns the names of all.

    One that a person has turned off stays off.

    Args:
        client: of the server that is to have them.
        silence_s: seconds without a heartbeat after which a run counts as crashed, more than HEARTBEAT_SECONDS.
        start_s: seconds after which a run that a worker has taken, and that has not begun to run, counts as crashed.
            Where a run waits in `Pending` for a machine, as on Kubernetes, set it beyond that wait.
        rest_s: seconds between a crash and the putting back, at least 10.
        reruns: how often a run that has begun is put back, at most.
    """
    crashes = [_crashed(rest_s, reruns), _crashed_before_start(rest_s), _never_started()]
    wanted = [_silent(silence_s), _stuck(start_s), *crashes]
    for automation in wanted:
        _ensure(client, automation)
    return [automation.name for automation in wanted]


def _ensure(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Leaves one that is as wanted alone: Prefect forgets on an update which runs it was watching."""
    standing = client.read_automations_by_name(wanted.name)
    if not standing:
        client.create_automation(wanted)
        return
    wanted = wanted.model_copy(update={"enabled": standing[0].enabled})
    if AutomationCore.model_validate(standing[0].model_dump(mode="json")) != wanted:
        client.update_automation(standing[0].id, wanted)


def _silent(silence_s: float) -> AutomationCore:
    # A start counts as a heartbeat: a process may die before it sends the first one.
    alive = _events(("heartbeat", *_STARTS))
    return AutomationCore(
        name="capfilt: a run that went silent has crashed",
        description=f"No heartbeat for {silence_s:.0f} s: the run's process is gone. Its state becomes Crashed.",
        trigger=_absence(alive, _events((*_ENDS, *_WAITS)), silence_s),
        actions=[_crash(f"No heartbeat for {silence_s:.0f} s: the process of this run is gone.")],
    )


def _stuck(start_s: float) -> AutomationCore:
    return AutomationCore(
        name="capfilt: a run that does not start has crashed",
        description=f"Pending for {start_s:.0f} s: whoever took the run is gone. Its state becomes Crashed.",
        trigger=_absence(_events(("Pending",)), _events((*_STARTS, *_ENDS, *_WAITS)), start_s),
        actions=[_crash(f"Taken by a worker, and not running {start_s:.0f} s later: the worker is gone.")],
    )


def _crashed(rest_s: float, reruns: int) -> AutomationCore:
    return AutomationCore(
        name="capfilt: a crashed run is put back",
        description=f"A crashed run with the tag {RERUN_TAG} waits for a worker again, {reruns} times at most.",
        trigger=_rest_after_crash(range(1, reruns + 1), rest_s),
        actions=[_put_back()],
    )


def _crashed_before_start(rest_s: float) -> AutomationCore:
    return AutomationCore(
        name="capfilt: a run that crashed before it started is told apart",
        description=f"A crashed run with the tag {RERUN_TAG} that never ran: its state is renamed {_NEVER_STARTED}.",
        trigger=_rest_after_crash([0], rest_s),
        actions=[_crash("The run's process was gone before the flow began.", _NEVER_STARTED)],
    )


def _never_started() -> AutomationCore:
    return AutomationCore(
        name="capfilt: a run that never started is put back",
        description=f"Such a run waits for a worker again, once in {_NEVER_STARTED_PERIOD.seconds // 60} minutes.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect=_events((_NEVER_STARTED,)),
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=[_tagged(TAG), _tagged(RERUN_TAG)],
            for_each={"prefect.resource.id"},
            threshold=1,
            within=_NEVER_STARTED_PERIOD,
        ),
        actions=[_put_back()],
    )


def _rest_after_crash(run_counts: Iterable[int], rest_s: float) -> EventTrigger:
    """Fires for a run of so many starts when it has crashed and nothing has happened since, for so long."""
    counts = [str(count) for count in run_counts]
    crashed, others = _events(("Crashed",)), _events((*_STARTS, *_ENDS, *_WAITS, "Pending", _NEVER_STARTED))
    return _absence(crashed, others, rest_s, (TAG, RERUN_TAG), {"prefect.run-count": counts})


def _absence(
    signs: set[str],
    ends: set[str],
    seconds: float,
    tags: Iterable[str] = (TAG,),
    labels: Mapping[str, list[str]] | None = None,
) -> EventTrigger:
    """Fires when a run's last sign is `seconds` old and no end came after it. Every sign starts the time anew."""
    return EventTrigger(
        posture=Posture.Proactive,
        after=signs,
        expect=signs | ends,
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"], **(labels or {})}),
        match_related=[_tagged(tag) for tag in tags],
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=seconds),
    )


def _tagged(tag: str) -> ResourceSpecification:
    return ResourceSpecification({"prefect.resource.role": ["tag"], "prefect.resource.id": [f"prefect.tag.{tag}"]})


def _events(names: Iterable[str]) -> set[str]:
    return {f"prefect.flow-run.{name}" for name in names}


def _crash(message: str, name: str = "Crashed") -> ChangeFlowRunState:
    # Without force a crash of what has ended meanwhile is refused, and so is another name for a crash.
    forced = name != "Crashed"
    return ChangeFlowRunState(state=StateType.CRASHED, name=name, message=message, force=forced)


def _put_back() -> ChangeFlowRunState:
    message = "The run's process was gone; what it has made stands, and the next worker goes on from there."
    return ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message, force=False)
