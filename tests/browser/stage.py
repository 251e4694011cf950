"""A Prefect to look at: a server that is set up, workers, the embedded scenes as their web, and a browser."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml
from playwright.sync_api import Locator, Page
from services.browser import browser
from services.postgres import postgres
from services.prefect import Server, Worker

from blip_core.scenes.server import serve_scenes
from blip_core.scenes.web import ScenesConfig, make_scenes, url_table

ENDS = ("Completed", "Failed", "Crashed", "Cancelled")
RUN_SECONDS = 600.0


class Stage(NamedTuple):
    """The page that is looked at, and what stands behind it."""

    server: Server
    page: Page
    foreign: set[str]  # hosts other than this machine's that pages have asked
    workspace: Path
    files: str  # where the workspace's parent folder is served

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The server's own word, to compare with what the page shows; a busy database is asked again."""
        method = "GET" if body is None else "POST"
        for _ in range(10):
            answer = httpx.request(method, f"{self.server.api}/{path}", json=body, timeout=60, trust_env=False)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        assert answer.is_success, answer.text
        return answer.json()

    def deployment(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"deployments/name/{name}/capfilt")
        return found

    def runs_of(self, name: str) -> list[dict[str, Any]]:
        """The runs of a deployment, the latest first."""
        wanted = {"deployments": {"id": {"any_": [self.deployment(name)["id"]]}}, "sort": "START_TIME_DESC"}
        found: list[dict[str, Any]] = self.ask("flow_runs/filter", wanted)
        return found

    def open_form(self, name: str) -> None:
        """From the deployment's page to the form of a custom run, as people go."""
        self.page.goto(f"{self.server.ui}/deployments/deployment/{self.deployment(name)['id']}")
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_text("Custom run").click()
        self.field("Workspace").wait_for()

    def field(self, *titles: str) -> Locator:
        """The form's field with this title, within the sections named before it."""
        found: Any = self.page
        for title in titles:
            label = found.locator("span.schema-form-property__label").filter(has_text=title).first
            found = label.locator("xpath=ancestor::div[contains(concat(' ',@class,' '),' schema-form-property ')][1]")
        return found  # type: ignore[no-any-return]

    def wait_for_end(self, run_id: str, seconds: float = RUN_SECONDS) -> None:
        """Waits until a run has completed."""
        self.wait_for(run_id, "Completed", seconds)

    def wait_for(self, run_id: str, state: str, seconds: float = RUN_SECONDS) -> None:
        """Waits until a run is in the state of this name; another end fails the test with the run's message."""
        deadline = time.monotonic() + seconds
        while (found := self.ask(f"flow_runs/{run_id}")["state"])["name"] != state:
            what = f"run {run_id} is {found['name']}: {found['message']}"
            assert found["name"] not in ENDS, what
            assert time.monotonic() < deadline, what
            time.sleep(1)


@contextmanager
def stage(folder: Path, scenes: ScenesConfig, settings: Mapping[str, Any]) -> Iterator[Stage]:
    """Everything at work in this folder, with `settings` as what the form begins with; ends all of it."""
    paths = make_scenes(folder / "scenes", scenes)
    with ExitStack() as running:
        web = running.enter_context(serve_scenes(paths.folder))
        urls = url_table(paths, web, paths.folder / "urls.parquet")
        files = running.enter_context(_served(folder))
        values = {
            **settings,
            "workspace": str(folder / "work"),
            "workspace_url": f"{files}/work",
            "web": {"path": str(urls), "caption": "alt", "uid": "uid"},
            "human": {"path": str(paths.human)},
            "held_out": {"path": str(paths.held_out)},
            "truth": str(paths.truth),
        }
        config = folder / "round.yaml"
        config.write_text(yaml.safe_dump(values, sort_keys=False))
        # SQLite answers "database is locked" where a machine is busy, and the form then stays where it is.
        database = running.enter_context(postgres())
        server = Server(folder / "server", database.url)
        running.enter_context(server).start()
        command = [sys.executable, "-m", "flows", "setup-prefect", str(config), "--gpus", "1"]
        made = subprocess.run(command, env=server.client, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        for pool in ("cpu", "gpu"):
            running.enter_context(Worker(server, pool, folder / "workers")).start()
        looked_at = running.enter_context(browser(folder / "browser"))
        yield Stage(server, looked_at.page, looked_at.foreign, folder / "work", files)


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The folder by http on loopback; its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
