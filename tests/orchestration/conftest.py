"""What these tests share: Prefect's test server, a tiny synthetic web, a configuration for it, and the command line."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

import flows.run
from blip_core.scenes.server import serve_scenes
from blip_core.scenes.web import ScenesConfig, make_scenes, url_table
from flows.cli import main

TINY = Path(__file__).with_name("tiny.yaml")

Configure = Callable[..., Path]


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One Prefect server for all tests that ask for it."""
    # The heartbeat's thread would cost every flow a second.
    with prefect_test_harness(), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@pytest.fixture(scope="session")
def tiny_web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with urls.parquet, human.parquet, held_out.parquet and truth.parquet; the pictures are served."""
    scenes = ScenesConfig(
        web_images=60, human_pairs=40, held_out=12, dead_links=3, non_images=1, truncated=1, oversized=1, duplicates=2
    )
    paths = make_scenes(tmp_path_factory.mktemp("tiny") / "web", scenes)
    with serve_scenes(paths.folder) as url:
        url_table(paths, url, paths.folder / "urls.parquet")
        yield paths.folder


@pytest.fixture
def configure(tiny_web: Path, tmp_path: Path) -> Configure:
    """Writes a configuration of the tiny web, with changes, and returns its path."""

    def write(**changes: Any) -> Path:
        values = yaml.safe_load(TINY.read_text()) | {
            "workspace": str(tmp_path / "workspace"),
            "web": {"path": str(tiny_web / "urls.parquet"), "caption": "alt", "uid": "uid"},
            "human": {"path": str(tiny_web / "human.parquet")},
            "held_out": {"path": str(tiny_web / "held_out.parquet")},
            "truth": str(tiny_web / "truth.parquet"),
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


@pytest.fixture
def capfilt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: (exit status, stdout, stderr)."""

    def leave(status: Any) -> NoReturn:
        raise SystemExit(status)

    monkeypatch.setattr(flows.run, "leave", leave)
    monkeypatch.setattr(flows.run, "run_flow", lambda *_: pytest.fail("the flow was started"))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capfilt", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        return int(end.value.code or 0), output.out, output.err

    return run
