"""Takes the README's pictures of Prefect's UI, of a real run: `python tests/browser/screenshots.py FOLDER`.

The folder, which must be free and is left there, is what the pictures show as the place of everything; a short one
such as /srv/capfilt is best. Takes some ten minutes.
"""

import re
import sys
from pathlib import Path

import yaml
from playwright.sync_api import expect

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser.stage import Stage, stage  # noqa: E402

from blip_core import scenes  # noqa: E402
from blip_core.scenes.web import ScenesConfig  # noqa: E402

DOCS = ROOT / "docs"
SCENES = ScenesConfig(web_images=1200, human_pairs=600)
STEPS = {"captioner": 250, "filter": 300, "retrain": 200}  # the demo's are more than pictures need
DEMO = Path(scenes.__file__).with_name("demo.yaml")


def main(folder: Path) -> None:
    """Fills the form, waits for the run, and takes the pictures."""
    folder.mkdir(parents=True)
    settings = yaml.safe_load(DEMO.read_text()) | {"scale": {"poll_seconds": 1.0}}
    for section, steps in STEPS.items():
        settings[section]["steps"] = steps
    with stage(folder, SCENES, settings) as ui:
        ui.open_form("bootstrap")
        _take(ui, "ui-form")
        ui.page.get_by_role("button", name="Submit").click()
        ui.page.wait_for_url(re.compile("deployments/deployment/[^/]*$"))
        (run,) = ui.runs_of("bootstrap")
        ui.wait_for_end(run["id"], seconds=3600)
        _take_run(ui, run["id"])
        _take_artifact(ui, "loss-med", "ui-loss")
        _take_artifact(ui, "round-pictures", "ui-pictures")


def _take_run(ui: Stage, run: str) -> None:
    ui.page.goto(f"{ui.server.ui}/runs/flow-run/{run}")
    ui.page.get_by_text("Artifacts", exact=True).click()
    expect(ui.page.get_by_text("round-pictures", exact=True)).to_be_visible()
    _take(ui, "ui-run")


def _take_artifact(ui: Stage, key: str, name: str) -> None:
    (found,) = ui.ask("artifacts/filter", {"artifacts": {"key": {"any_": [key]}}})
    ui.page.goto(f"{ui.server.ui}/artifacts/artifact/{found['id']}")
    expect(ui.page.locator("img[src^='data:image/']").first).to_be_visible()
    _take(ui, name)


def _take(ui: Stage, name: str) -> None:
    ui.page.wait_for_timeout(3000)  # what moves comes to rest
    ui.page.screenshot(path=DOCS / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
