"""What can go wrong while a cycle runs on the platform: each fault is struck, lasts a while, and is over."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType

from services import disk
from services.platform import POOLS, Platform, processes_of

DATABASE_SECONDS = 20.0
FULL_SECONDS = 15.0
_CHILD_SECONDS = 90.0


class Stage(NamedTuple):
    """Where a fault is struck."""

    platform: Platform
    run: UUID  # the cycle's
    disk: Path | None  # that the workspace has for itself, where there is one
    chance: random.Random


class Struck(NamedTuple):
    """What a fault has hit."""

    what: str
    runs: list[UUID]  # whose processes died of it


Fault = Callable[[Stage], Struck]


def kill_worker(stage: Stage) -> Struck:
    """Its runs go on without it."""
    pool = stage.chance.choice(POOLS)
    stage.platform.workers[pool].strike(signal.SIGKILL)
    return Struck(f"worker {pool}", [])


def stop_worker(stage: Stage) -> Struck:
    """It ends its runs with it and leaves them in the state Running."""
    pool = stage.chance.choice(POOLS)
    runs = [run.id for run in running_runs(stage, pool)]
    stage.platform.workers[pool].strike(signal.SIGTERM)
    return Struck(f"worker {pool}, with {len(runs)} runs", runs)


def kill_worker_with_its_runs(stage: Stage) -> Struck:
    """As when a machine dies: nobody is left to tell the server."""
    stage.platform.workers["cpu"].strike(signal.SIGKILL)
    killed = 0
    while processes := processes_of(stage.run):  # those as well that were just being born
        killed += _kill(processes)
    return Struck(f"worker cpu, {killed} processes of the cycle", [stage.run])


def kill_cycle(stage: Stage) -> Struck:
    """The process of the flow run alone, as the kernel kills what takes too much memory."""
    return Struck(f"{_kill(processes_of(stage.run)[:1])} process", [stage.run])


def kill_training(stage: Stage) -> Struck:
    """The process of a run in the pool `gpu`: a training or a batch of annotation."""
    child = running_child(stage)
    if child is None:
        return Struck("came too late", [])
    return Struck(f"{child.name}, {_kill(processes_of(child.id)[:1])} process", [child.id])


def kill_server(stage: Stage) -> Struck:
    stage.platform.server.strike(signal.SIGKILL)
    return Struck("server", [])


def stop_database(stage: Stage) -> Struck:
    stage.platform.database.kill(signal.SIGINT)  # its 'fast shutdown', which ends connections
    time.sleep(DATABASE_SECONDS)
    stage.platform.database.start()
    return Struck(f"away for {DATABASE_SECONDS:.0f} s", [])


def fill_disk(stage: Stage) -> Struck:
    if stage.disk is None:
        return Struck("skipped: no tmpfs can be mounted here", [])
    disk.fill(stage.disk)
    time.sleep(FULL_SECONDS)
    disk.free(stage.disk)
    return Struck(f"full for {FULL_SECONDS:.0f} s", [])


# In this order each is the first fault of a seed, in its turn.
FAULTS: dict[str, Fault] = {
    "worker and its runs killed": kill_worker_with_its_runs,
    "server killed": kill_server,
    "training killed": kill_training,
    "worker stopped": stop_worker,
    "PostgreSQL stopped": stop_database,
    "flow run killed": kill_cycle,
    "disk full": fill_disk,
    "worker killed": kill_worker,
}


def running_runs(stage: Stage, pool: str) -> list[FlowRun]:
    """The runs that work in a pool, with a living process."""
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    runs = stage.platform.ask(lambda client: client.read_flow_runs(flow_run_filter=running))
    return [run for run in runs if run.work_pool_name == pool and processes_of(run.id)]


def running_child(stage: Stage) -> FlowRun | None:
    """A run that works in the pool `gpu`, when there is one; None where the cycle ends before."""
    deadline = time.monotonic() + _CHILD_SECONDS
    while time.monotonic() < deadline and not stage.platform.state(stage.run).is_final():
        if children := running_runs(stage, "gpu"):
            return children[0]
        time.sleep(0.2)
    return None


def _kill(processes: list[int]) -> int:
    """SIGKILLs processes; returns how many there were."""
    killed = 0
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            killed += 1
    return killed
