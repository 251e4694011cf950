"""Prefect's UI as people use it: a run of `bootstrap` from the form to its artifacts, and one that is cancelled.

The browser is real, and so is all behind it. The tests go on from each other's pages, in the order of the file.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from browser.stage import Stage, stage
from playwright.sync_api import expect

from blip_core.config import BootstrapConfig
from blip_core.scenes.web import ScenesConfig

# Of real programs on a machine that may be busy with others: long waits, and no haste asserted.
pytestmark = pytest.mark.timeout(900)

TINY = Path(__file__).parents[1] / "orchestration" / "tiny.yaml"
SCENES = ScenesConfig(
    web_images=60, human_pairs=40, held_out=12, dead_links=3, non_images=1, truncated=1, oversized=1, duplicates=2
)
MODELS = ("med", "captioner", "filter", "retrained", "retrained-raw")
# Each page of Prefect's second UI asks it for a configuration, in vain here.
TELEMETRY = {"sr-client-cfg.amplitude.com"}


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    settings = {**yaml.safe_load(TINY.read_text()), "scale": {"poll_seconds": 1.0}}
    with stage(tmp_path_factory.mktemp("ui"), SCENES, settings) as made:
        yield made


def test_the_form_has_every_field_with_its_description_and_default(ui: Stage) -> None:
    ui.open_form("bootstrap")
    shown = letters(ui.page.locator("form").inner_text())
    schema = BootstrapConfig.model_json_schema()
    sections = [schema, *(schema["$defs"][name] for name in ("TrainConfig", "DownloadConfig", "PublishConfig"))]
    descriptions = [field["description"] for section in sections for field in section["properties"].values()]
    assert len(descriptions) > 50
    assert [text for text in descriptions if letters(text) not in shown] == []
    assert ui.field("Pretrain", "Steps").locator("input").input_value() == "12"
    assert ui.field("Publish", "Where").locator("textarea").input_value() == "hash(uid, candidate) % 3 > 0"


def letters(text: str) -> str:
    """Without what markdown may take for markup."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def test_a_bad_value_is_refused_in_the_form_and_no_run_is_made(ui: Stage) -> None:
    ui.field("Pretrain", "Steps").locator("input").fill("-5")
    ui.page.get_by_role("button", name="Submit").click()
    refusal = "Validation failed for field 'config.pretrain.steps'. Failure reason: -5 is less than the minimum of 1"
    expect(ui.page.get_by_text(refusal).first).to_be_visible()
    assert "/run?" in ui.page.url
    assert ui.runs_of("bootstrap") == []


@pytest.fixture(scope="module")
def finished(ui: Stage) -> dict[str, Any]:
    """A run of `bootstrap` that was started in the form with another seed and a workspace of its own, at its end."""
    ui.open_form("bootstrap")
    ui.field("Seed").locator("input").fill("3")
    ui.field("Workspace").locator("textarea").fill(str(ui.workspace.with_name("other")))
    ui.field("Workspace Url").locator("textarea").fill(f"{ui.files}/other")
    ui.page.get_by_role("button", name="Submit").click()
    ui.page.wait_for_url(re.compile("deployments/deployment/[^/]*$"))
    (run,) = ui.runs_of("bootstrap")
    ui.wait_for_end(run["id"])
    return run


def test_a_run_that_the_form_started_has_the_values_of_the_form(finished: dict[str, Any], ui: Stage) -> None:
    config = finished["parameters"]["config"]
    assert (config["seed"], config["workspace"]) == (3, str(ui.workspace.with_name("other")))
    assert config["pretrain"]["steps"] == 12
    assert (ui.workspace.with_name("other") / "rounds" / "0001" / "report.html").is_file()


def test_the_runs_page_lists_its_artifacts_whichever_worker_made_them(finished: dict[str, Any], ui: Stage) -> None:
    ui.page.goto(f"{ui.server.ui}/runs/flow-run/{finished['id']}")
    expect(ui.page.get_by_text("Completed", exact=True).first).to_be_visible()
    ui.page.get_by_text("Artifacts", exact=True).click()
    keys = [f"{step}-progress" for step in ("download", "annotation", "publish", "evaluation")]
    keys += [f"{kind}-{model}" for kind in ("training", "loss", "metrics") for model in MODELS]
    keys += ["round-report", "round-numbers", "round-scores", "round-pictures"]
    for key in keys:
        expect(ui.page.get_by_text(key, exact=True)).to_be_visible()
    expect(ui.page.get_by_text(re.compile(r"^download: 68 of 68, [\d.]+ images/s$"))).to_be_visible()
    expect(ui.page.get_by_text(re.compile(r"^med: 12 of 12, [\d.]+ steps/s, [\d.e+]+ images/s, itc "))).to_be_visible()


def artifact(ui: Stage, run: dict[str, Any], key: str) -> str:
    """The id of the only artifact that the run has under a key."""
    wanted = {"artifacts": {"key": {"any_": [key]}, "flow_run_id": {"any_": [run["id"]]}}}
    (found,) = ui.ask("artifacts/filter", wanted)
    return str(found["id"])


@pytest.mark.parametrize("version", ["", "/v2"])
@pytest.mark.parametrize(("key", "pictures"), [("loss-med", 1), ("round-scores", 1), ("round-pictures", 3)])
def test_pictures_are_painted(key: str, pictures: int, version: str, finished: dict[str, Any], ui: Stage) -> None:
    ui.page.goto(f"{ui.server.ui}{version}/artifacts/artifact/{artifact(ui, finished, key)}")
    painted = ui.page.locator("img[src^='data:image/']")
    expect(painted).to_have_count(pictures)
    for picture in painted.all():
        expect(picture).to_be_visible()
        deadline = time.monotonic() + 30
        while picture.evaluate("image => image.complete && image.naturalWidth") < 600:
            assert time.monotonic() < deadline, "the picture is not painted"


@pytest.mark.parametrize("version", ["", "/v2"])
def test_tables_have_the_rounds_numbers_and_the_trainings_metrics(
    version: str, finished: dict[str, Any], ui: Stage
) -> None:
    report = ui.workspace.with_name("other") / "rounds" / "0001"
    auc = json.loads((report / "evaluation.json").read_text())["audit"]["filter_auc"]
    ui.page.goto(f"{ui.server.ui}{version}/artifacts/artifact/{artifact(ui, finished, 'round-report')}")
    row = ui.page.get_by_role("row").filter(has_text="AUC of the Filter")
    expect(row).to_contain_text(f"{auc:.3f}")
    rows = [json.loads(line) for line in (report / "metrics" / "med.jsonl").read_text().splitlines()]
    ui.page.goto(f"{ui.server.ui}{version}/artifacts/artifact/{artifact(ui, finished, 'metrics-med')}")
    row = ui.page.get_by_role("row").filter(has=ui.page.get_by_text("12", exact=True))
    expect(row).to_contain_text(f"{rows[-1]['itm']:.4g}")


def test_the_report_opens_by_its_link(finished: dict[str, Any], ui: Stage) -> None:
    ui.page.goto(f"{ui.server.ui}/artifacts/artifact/{artifact(ui, finished, 'round-report')}")
    link = ui.page.get_by_role("link", name="The report of round 1")
    ui.page.goto(str(link.get_attribute("href")))
    expect(ui.page).to_have_title("capfilt · round 1")
    expect(ui.page.get_by_role("heading", name="Before and after")).to_be_visible()


def test_no_page_asked_anything_of_another_machine(finished: dict[str, Any], ui: Stage) -> None:
    assert ui.foreign <= TELEMETRY


def at_work(ui: Stage) -> list[int]:
    """The processes of this server's flow runs, their children among them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            if environment.get("PREFECT_API_URL") == ui.server.api and "PREFECT__FLOW_RUN_ID" in environment:
                found.append(process.pid)
    return found


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 400
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def test_a_run_cancelled_in_the_browser_stops_its_processes_and_another_goes_on_from_there(ui: Stage) -> None:
    workspace = ui.workspace.with_name("cancelled")
    metrics = workspace / "rounds" / "0001" / "metrics" / "med.jsonl"
    config = ui.deployment("bootstrap")["parameters"]["config"] | {"workspace": str(workspace)}
    config["pretrain"] |= {"steps": 5000, "save_every": 20, "log_every": 20}
    run = start(ui, "bootstrap", config)
    until(lambda: steps(metrics) >= 60, "the training does not begin")
    ui.page.goto(f"{ui.server.ui}/runs/flow-run/{run}")
    ui.page.get_by_role("button", name="Cancel").click()
    ui.page.get_by_role("button", name="Confirm").click()
    until(lambda: not at_work(ui), "processes of a cancelled run are at work")
    states = {"state": {"type": {"any_": ["RUNNING", "CANCELLING", "PENDING"]}}}
    until(lambda: ui.ask("flow_runs/filter", {"flow_runs": states}) == [], "runs are not over")
    expect(ui.page.get_by_text("Cancelled", exact=True).first).to_be_visible()
    before = metrics.read_text().splitlines()
    assert 60 <= steps(metrics) < 5000

    run = start(ui, "pretrain", config)
    until(lambda: steps(metrics) > 20 * len(before) + 20, "the training does not go on")
    assert metrics.read_text().splitlines()[: len(before) - 1] == before[:-1]  # not trained again
    ui.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    until(lambda: not at_work(ui), "processes of a cancelled run are at work")


def start(ui: Stage, name: str, config: dict[str, Any]) -> str:
    """Starts a deployment as the form does; the run's id."""
    body = {"parameters": {"config": config}, "state": {"type": "SCHEDULED"}}
    return str(ui.ask(f"deployments/{ui.deployment(name)['id']}/create_flow_run", body)["id"])


def steps(metrics: Path) -> int:
    """The last step that the metrics file tells of."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)
