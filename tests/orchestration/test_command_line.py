"""The command line: one line for what the user got wrong, JSON for programs, and nothing half-written."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml

import flows.run
from blip_core.workspace import Workspace
from flows.cli import app

Configure = Callable[..., Path]

COMMANDS = (
    "demo", "bootstrap", "clean", "download", "pretrain", "finetune", "annotate", "publish", "retrain", "evaluation",
    "train", "caption", "score", "convert", "query", "sweep", "explain", "report", "export", "audit", "re-bootstrap",
    "forget", "rounds", "promote", "rollback", "setup-prefect",
)  # fmt: skip


def web(path: Path | str, **columns: str) -> dict[str, dict[str, str]]:
    return {"web": {"path": str(path), **columns}}


def bad_tables(folder: Path) -> dict[str, tuple[dict[str, Any], str, int]]:
    """Case: (changes of the configuration, what the line must name, exit status)."""
    pq.write_table(pa.table({"link": ["http://127.0.0.1/a.jpg"], "alt": ["a"]}), folder / "columns.parquet")
    pq.write_table(
        pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}), folder / "no.parquet"
    )
    (folder / "torn.parquet").write_bytes((folder / "columns.parquet").read_bytes()[:-20])
    pq.write_table(pa.table({"image": ["no bytes"], "caption": ["a"]}), folder / "human.parquet")
    (folder / "file").touch()
    return {
        "missing table": (web(folder / "none.parquet"), "none.parquet", 1),
        "torn table": (web(folder / "torn.parquet"), "torn.parquet", 1),
        "missing column": (web(folder / "columns.parquet"), "web.url", 1),
        "empty table": (web(folder / "no.parquet"), "no.parquet", 1),
        "unknown format": (web(folder / "file"), "file", 1),
        "no image bytes": ({"human": {"path": str(folder / "human.parquet")}}, "'image'", 1),
        "missing held-out": ({"held_out": {"path": str(folder / "held.parquet")}}, "held.parquet", 1),
        "unknown key": ({"pretrian": {"steps": 1}}, "pretrian", 2),
        "unknown inner key": ({"pretrain": {"step": 1}}, "pretrain.step", 2),
        "value out of range": ({"pretrain": {"steps": 0}}, "pretrain.steps", 2),
        "wrong type": ({"seed": "many"}, "seed", 2),
        "sizes that do not fit": ({"med": {"preset": "tiny", "image_size": 40, "patch_size": 16}}, "image_size", 2),
        "bad predicate": ({"publish": {"where": "itm_scor > 0.5"}}, "itm_scor", 2),
        "workspace below a file": ({"workspace": str(folder / "file" / "workspace")}, "workspace", 1),
    }


CASES = (
    "missing table", "torn table", "missing column", "empty table", "unknown format", "no image bytes",
    "missing held-out", "unknown key", "unknown inner key", "value out of range", "wrong type",
    "sizes that do not fit", "bad predicate", "workspace below a file",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_that_names_it_before_anything_is_started(
    case: str, capfilt: Callable[..., tuple[int, str, str]], configure: Configure, tmp_path: Path
) -> None:
    changes, named, expected = bad_tables(tmp_path)[case]
    status, out, err = capfilt("bootstrap", str(configure(**changes)))
    assert status == expected
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err
    assert not list(tmp_path.rglob("workspace/shards/*"))
    assert not list(tmp_path.rglob("workspace/rounds/*"))


def test_a_missing_and_a_malformed_configuration_are_named(
    capfilt: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, err = capfilt("bootstrap", str(tmp_path / "none.yaml"))
    assert (status, err.count("\n")) == (2, 1)
    assert "none.yaml" in err
    (tmp_path / "bad.yaml").write_text("web: {path: [")
    status, _, err = capfilt("download", str(tmp_path / "bad.yaml"))
    assert (status, err.count("\n")) == (2, 1)
    assert "bad.yaml" in err


def test_clean_asks_for_both_models_and_names_the_one_that_is_missing(
    capfilt: Callable[..., tuple[int, str, str]], configure: Configure, tmp_path: Path
) -> None:
    status, _, err = capfilt("clean", str(configure()))
    assert (status, err.count("\n")) == (2, 1)
    assert "checkpoints.captioner" in err
    nowhere = {"captioner": str(tmp_path / "nowhere"), "filter": str(tmp_path / "nowhere")}
    status, _, err = capfilt("clean", str(configure(checkpoints=nowhere)))
    assert (status, err.count("\n")) == (1, 1)
    assert str(tmp_path / "nowhere") in err


def test_a_setting_of_the_command_line_must_be_a_key_and_a_value(
    capfilt: Callable[..., tuple[int, str, str]], configure: Configure
) -> None:
    status, _, err = capfilt("bootstrap", str(configure()), "--set", "pretrain.steps")
    assert (status, err.count("\n")) == (2, 1)
    assert "KEY=VALUE" in err
    status, _, err = capfilt("bootstrap", str(configure()), "--set", "pretrain.steps=0")
    assert (status, err.count("\n")) == (2, 1)
    assert "pretrain.steps" in err


def test_settings_of_the_command_line_override_the_file(
    monkeypatch: pytest.MonkeyPatch, capfilt: Callable[..., tuple[int, str, str]], configure: Configure
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(flows.run, "run_flow", lambda *arguments: started.append(arguments))
    status, _, _ = capfilt(
        "pretrain", str(configure()), "--seed", "7", "--round", "2", "--set", "pretrain.steps=3", "--set", "truth=null"
    )
    assert status == 0
    ((name, config, _),) = started
    assert name == "pretrain"
    assert (config.seed, config.round, config.pretrain.steps, config.truth) == (7, 2, 3, None)


def test_query_prints_a_table_or_json(capfilt: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    Workspace(tmp_path).shards.mkdir()
    sql = "SELECT 7 AS seven, '[a]' AS letter, NULL AS nothing, 'ab'::BLOB AS bytes, 8 AS seven"
    status, out, err = capfilt("query", sql, "--workspace", str(tmp_path), "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == [{"seven": 7, "letter": "[a]", "nothing": None, "bytes": "YWI=", "seven_1": 8}]
    status, out, err = capfilt("query", sql, "--workspace", str(tmp_path))
    assert (status, err) == (0, "")
    cells = [cell.strip() for cell in out.splitlines()[3].split("│")[1:-1]]
    assert cells == ["7", "[a]", "null", "2 bytes", "8"]


@pytest.mark.parametrize("sql", ["SELEC 1", "SELECT nothing FROM corpus", "DROP VIEW corpus", ""])
def test_a_query_that_cannot_run_gets_one_line(
    sql: str, capfilt: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    Workspace(tmp_path).shards.mkdir()
    status, out, err = capfilt("query", sql, "--workspace", str(tmp_path))
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [("report",), ("query", "SELECT 1", "--workspace")])
def test_a_workspace_that_is_none_is_named(
    command: tuple[str, ...], capfilt: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, err = capfilt(*command, str(tmp_path))
    assert (status, err.count("\n")) == (1, 1)
    assert str(tmp_path) in err


def test_every_command_has_a_help_text(capfilt: Callable[..., tuple[int, str, str]]) -> None:
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)  # type: ignore[attr-defined]
    for command in COMMANDS:
        status, out, _ = capfilt(command, "--help")
        assert status == 0
        assert out.strip().startswith("Usage")
    status, out, _ = capfilt("--version")
    assert status == 0
    assert out.startswith("capfilt ")


def test_help_answers_at_once_because_it_imports_no_model_and_no_prefect() -> None:
    code = """
import os, sys, flows.cli
sys.argv = ["capfilt", "--help"]
os._exit = lambda status: print(sorted({"torch", "prefect", "duckdb", "pyarrow", "pydantic"} & set(sys.modules)))
flows.cli.main()
"""
    began = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - began < 10


def test_the_module_and_the_command_are_the_same_program(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"workspace": str(tmp_path / "w"), "nonsense": 1}))
    script = Path(sys.executable).with_name("capfilt")
    answers = [
        subprocess.run([*command, "download", str(config)], capture_output=True, text=True, check=False)
        for command in ([sys.executable, "-m", "flows"], [str(script)])
    ]
    for answer in answers:
        assert answer.returncode == 2
        assert answer.stderr.startswith("error: ")
        assert "Traceback" not in answer.stderr
    assert answers[0].stderr == answers[1].stderr
