"""Artifacts: what Prefect's pages show of a run while it works and when it is done.

All artifacts belong to the run that somebody started, whichever of its steps wrote them and wherever; each key is
written once for it and then updated in place, also after the run was put back: the next run makes the next version.
A server that does not answer costs an artifact, never the work. Outside of a run nothing is written.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

UPDATE_SECONDS = 10.0
# Work waits this long for an answer, and then goes on without asking for a while.
ANSWER_SECONDS = 5.0
SILENT_SECONDS = 60.0
# What is written once is tried again over a minute, in which a server is started again.
PAUSES = (2.0, 5.0, 10.0, 20.0, 30.0)

KEYS = {"annotate": "annotation-progress", "download": "download-progress"}
KEYS |= {step: f"{step}-progress" for step in ("publish", "evaluation")}

# Runs that come by the hundred; the run that hands them out shows the whole.
UNSHOWN = ("annotate-batch",)

Cell = str | int | None


class ArtifactDisplay:
    """The progress of each step as one progress artifact, updated every ten seconds and at its end."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], float] = {}

    def show(self, step: str, done: int, total: int, note: str) -> None:
        """The artifact's key is `<step>-progress`, or `training-<model>` where a model is trained."""
        place = (flow_run.id or "", step)
        now = time.monotonic()
        if done < total and now - self._last.get(place, -UPDATE_SECONDS) < UPDATE_SECONDS:
            return
        self._last[place] = now
        if flow_run.flow_name in UNSHOWN:
            return
        percent = min(100.0 * done / total, 100.0) if total else 100.0
        said = f"{step}: {done:,} of {total:,}" + (f", {note}" if note else "")
        _write(ArtifactCreate(type="progress", key=progress_key(step), data=percent, description=said), hurried=True)

    def say(self, line: str) -> None:
        """Nothing: lines are for the log."""


def progress_key(step: str) -> str:
    """The key of a step's progress artifact; a step that is none of ours is a model in training."""
    return KEYS.get(step, f"training-{step}")


def show_markdown(key: str, markdown: str, description: str, hurried: bool = False) -> None:
    """A page of text and pictures. `hurried`: one try, for what is shown again soon."""
    _write(ArtifactCreate(type="markdown", key=key, data=markdown, description=description), hurried)


def show_table(key: str, rows: Sequence[Mapping[str, Cell]], description: str, hurried: bool = False) -> None:
    """A table, a column for each name in the rows. `hurried`: one try, for what is shown again soon."""
    table = json.dumps([dict(row) for row in rows])
    _write(ArtifactCreate(type="table", key=key, data=table, description=description), hurried)


class _Shelf:
    """Which artifacts of which runs stand already, and since when the server has not answered."""

    def __init__(self) -> None:
        self._ids: dict[tuple[UUID, str], UUID] = {}
        self._owners: dict[str, UUID] = {}
        self._lock = threading.RLock()
        self.silent_until = 0.0

    def put(self, client: SyncPrefectClient, artifact: ArtifactCreate) -> None:
        """Makes the artifact for the run that was started, or updates the one that it has under this key."""
        with self._lock:
            owner = self._owner(client, str(flow_run.id))
            place = (owner, str(artifact.key))
            if place not in self._ids and (standing := _find(client, *place)) is not None:
                self._ids[place] = standing
            if place in self._ids and _update(client, self._ids[place], artifact):
                return
            artifact.flow_run_id = owner
            self._ids[place] = client.create_artifact(artifact).id

    def _owner(self, client: SyncPrefectClient, run_id: str) -> UUID:
        """The run that has no other above it, this one or another."""
        if run_id not in self._owners:
            run = client.read_flow_run(UUID(run_id))
            while run.parent_task_run_id is not None:
                above = client.read_task_run(run.parent_task_run_id).flow_run_id
                if above is None:
                    break
                run = client.read_flow_run(above)
            self._owners[run_id] = run.id
        return self._owners[run_id]


_shelf = _Shelf()


def _write(artifact: ArtifactCreate, hurried: bool) -> None:
    silent = time.monotonic() < _shelf.silent_until
    if not flow_run.id or (hurried and silent):
        return
    pauses = () if hurried or silent else PAUSES
    failure = _try(artifact)
    for pause in pauses:
        if failure is None or _is_ours(failure):
            break
        time.sleep(pause)
        failure = _try(artifact)
    if failure is not None:
        _shelf.silent_until = time.monotonic() + SILENT_SECONDS
        get_run_logger().warning("artifact %s was not written (%s); the work goes on", artifact.key, _reason(failure))


def _try(artifact: ArtifactCreate) -> Exception | None:
    """Writes the artifact, or returns why not."""
    try:
        # Prefect's own tries would hold up the work for a minute.
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client({"timeout": ANSWER_SECONDS}, sync_client=True) as client,
        ):
            _shelf.put(client, artifact)
    except (httpx.HTTPError, PrefectException) as failure:
        return failure
    return None


def _reason(failure: Exception) -> str:
    if isinstance(failure, httpx.HTTPStatusError):
        return f"the server answered {failure.response.status_code} {failure.response.reason_phrase}"
    return str(failure) or type(failure).__name__


def _is_ours(failure: Exception) -> bool:
    """Whether the server has refused what it was sent, which another try does not change."""
    return isinstance(failure, httpx.HTTPStatusError) and failure.response.is_client_error


def _find(client: SyncPrefectClient, owner: UUID, key: str) -> UUID | None:
    """What this run wrote under the key before its process died."""
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[owner]))
    standing = client.read_artifacts(artifact_filter=wanted, limit=1)
    return standing[0].id if standing else None


def _update(client: SyncPrefectClient, standing: UUID, artifact: ArtifactCreate) -> bool:
    """False where somebody has deleted it."""
    change = ArtifactUpdate(data=artifact.data, description=artifact.description)
    try:
        client.update_artifact(standing, change)
    except httpx.HTTPStatusError as failure:
        if failure.response.status_code != httpx.codes.NOT_FOUND:
            raise
        return False
    return True
