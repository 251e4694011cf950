"""What Prefect's pages show of a run: kept up to date, on the page of the run that was started, never in work's way."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect import flow, task
from prefect.artifacts import Artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact as Written
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings

from blip_core.config import load_config
from blip_core.training.metrics import Measured, MetricsLog
from blip_core.workspace import Workspace
from tasks import artifacts, curves, progress
from tasks.report import show_report

pytestmark = pytest.mark.usefixtures("prefect_server")

Configure = Callable[..., Path]


@pytest.fixture(autouse=True)
def shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just begun."""
    monkeypatch.setattr(artifacts, "_shelf", artifacts._Shelf())


def versions(key: str) -> list[Written]:
    """All artifacts with this key, the oldest first."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return sorted(found, key=lambda artifact: str(artifact.created))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_progress_of_a_step_is_one_artifact_updated_every_ten_seconds_and_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(artifacts.time, "monotonic", clock)
    seen: list[Any] = []

    @flow
    def step() -> None:
        display = artifacts.ArtifactDisplay()
        for done in (0, 10, 20, 30, 40):
            display.show("annotate", done, 40, "3 images/s, 5 s left" if done else "")
            (artifact,) = versions("annotation-progress")
            seen.append((artifact.data, artifact.description))
            clock.now += 6

    step()
    assert seen == [
        (0, "annotate: 0 of 40"),
        (0, "annotate: 0 of 40"),  # 6 s later
        (50, "annotate: 20 of 40, 3 images/s, 5 s left"),
        (50, "annotate: 20 of 40, 3 images/s, 5 s left"),
        (100, "annotate: 40 of 40, 3 images/s, 5 s left"),
    ]


def test_what_steps_and_tasks_write_stands_on_the_page_of_the_run_that_was_started() -> None:
    started = []

    @task
    def work() -> None:
        artifacts.show_markdown("test-owner", "task", "")

    @flow
    def step() -> None:
        artifacts.show_markdown("test-owner", "step", "")
        work()

    @flow
    def cycle() -> None:
        started.append(flow_run.id)
        step()

    cycle()
    (artifact,) = versions("test-owner")
    assert (str(artifact.flow_run_id), artifact.data) == (started[0], "task")


def test_the_next_run_makes_the_next_version() -> None:
    @flow
    def run(text: str) -> None:
        artifacts.show_markdown("test-versions", text, "")

    run("first")
    run("second")
    assert [artifact.data for artifact in versions("test-versions")] == ["first", "second"]
    latest = Artifact.get("test-versions")
    assert latest is not None
    assert latest.data == "second"


def test_a_run_that_was_put_back_goes_on_with_the_artifact_of_its_dead_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @flow
    def run() -> None:
        artifacts.show_markdown("test-put-back", "before", "")
        monkeypatch.setattr(artifacts, "_shelf", artifacts._Shelf())
        artifacts.show_markdown("test-put-back", "after", "")

    run()
    assert [artifact.data for artifact in versions("test-put-back")] == ["after"]


def test_an_artifact_that_somebody_deleted_is_made_again() -> None:
    @flow
    def run() -> None:
        artifacts.show_table("test-deleted", [{"a": 1}], "")
        with get_client(sync_client=True) as client:
            client.delete_artifact(versions("test-deleted")[0].id)
        artifacts.show_table("test-deleted", [{"a": 2}], "")

    run()
    assert [json.loads(artifact.data) for artifact in versions("test-deleted")] == [[{"a": 2}]]


def test_outside_of_a_run_nothing_is_written() -> None:
    artifacts.show_markdown("test-outside", "text", "")
    artifacts.ArtifactDisplay().show("test-outside", 1, 2, "")
    assert versions("test-outside") == versions("training-test-outside") == []


@contextmanager
def ailing(statuses: list[int]) -> Iterator[tuple[str, list[str]]]:
    """A server that answers with these statuses, the last one for ever; its address, and what artifacts asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if "/flow_runs/" in self.path:  # the first thing that an artifact asks; logs and events ask others
                asked.append(self.path)
            self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_PATCH = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_that_ails_is_left_in_peace_for_a_minute_and_the_work_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(artifacts.time, "monotonic", clock)

    @flow
    def run() -> str:
        with ailing([503]) as (address, asked), temporary_settings({PREFECT_API_URL: address}):
            for _ in range(5):
                artifacts.show_markdown("test-ailing", "text", "", hurried=True)
            calls = len(asked)
            clock.now += artifacts.SILENT_SECONDS
            artifacts.show_markdown("test-ailing", "text", "", hurried=True)
            assert (calls, len(asked)) == (1, 2)
        return "done"

    assert run() == "done"
    assert sum("test-ailing was not written" in record.message for record in caplog.records) == 2


def test_a_server_that_is_not_there_costs_the_artifact_alone() -> None:
    with ailing([500]) as (address, _):
        pass

    @flow
    def run() -> str:
        with temporary_settings({PREFECT_API_URL: address}):
            artifacts.show_markdown("test-gone", "text", "", hurried=True)
        return "done"

    assert run() == "done"


def test_what_is_written_once_waits_for_a_server_that_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    @flow
    def run() -> None:
        address = PREFECT_API_URL.value()
        with ailing([500]) as (ill, asked):
            settings = temporary_settings({PREFECT_API_URL: ill})
            settings.__enter__()

            def sleep(seconds: float) -> None:
                waited.append(seconds)
                if len(waited) == 2:
                    settings.__exit__(None, None, None)

            monkeypatch.setattr(artifacts.time, "sleep", sleep)
            artifacts.show_markdown("test-patient", "text", "")
            assert len(asked) == 2
        assert PREFECT_API_URL.value() == address

    run()
    assert waited == list(artifacts.PAUSES[:2])
    assert [artifact.data for artifact in versions("test-patient")] == ["text"]


@pytest.mark.parametrize("steps", [3, 500])
def test_a_training_under_way_shows_its_curve_and_its_metrics(
    steps: int, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(configure())
    log = MetricsLog(Workspace.open(config.workspace).round(1).metrics / "med.jsonl", "med", 0)
    for step in range(1, steps + 1):
        log.write(step, {"itc": 2 / step, "lm": 1.0}, Measured(0.001, 1.0, 50.0, 0.1, 0))

    @flow
    def run() -> None:
        watch = curves.watch_training("med", config)
        watch(steps - 1, steps, {"itc": 0.5})
        assert versions("loss-med") == before  # not every step
        watch(steps, steps, {"itc": 0.25})

    before = versions("loss-med")
    run()
    picture, table = versions("loss-med")[-1], json.loads(versions("metrics-med")[-1].data)
    head, _, data = picture.data.removesuffix(")").partition(",")
    assert head.endswith("](data:image/png;base64")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size[0] > 600
    assert [table[0]["step"], table[-1]["step"]] == [steps, 1]
    assert len(table) == min(steps, curves.TABLE_ROWS)
    assert table[-1] == {
        "step": 1, "loss": "3", "itc": "2", "lm": "1", "learning rate": "0.001", "gradient norm": "1",
        "images per second": "50", "data wait": "0.1", "undecodable": 0,
    }  # fmt: skip
    assert versions("training-med")[-1].data == 100


def test_a_training_is_told_in_steps_and_images_a_second_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, notes = Clock(), []
    monkeypatch.setattr(progress.Meter.__init__, "__defaults__", (0, "images", clock))
    watch = progress.TrainingProgress("med", 64, lambda *shown: notes.append(shown))
    for done in (501, 511, 521):  # the first 500 were another process's
        watch(done, 1000, {"itc": 1.5, "lm": 0.25})
        clock.now += 5
    assert notes[0] == ("med", 501, 1000, "itc 1.500  lm 0.250")
    assert notes[2] == ("med", 521, 1000, "2 steps/s, 4 min 00 s left, 128 images/s, itc 1.500  lm 0.250")


def test_the_report_is_a_link_where_the_workspace_is_served_and_else_a_path(configure: Configure) -> None:
    for url, expected in (
        ("http://files.example/work/", "[The report of round 1](http://files.example/work/rounds/0001/report.html)"),
        (None, "rounds/0001/report.html`"),
    ):
        config = load_config(configure(workspace_url=url))
        Workspace.open(config.workspace).round(1).root.mkdir(parents=True, exist_ok=True)

        @flow
        def run() -> None:
            show_report(config)  # noqa: B023

        run()
        assert expected in versions("round-report")[-1].data.splitlines()[0]
