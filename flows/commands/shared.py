"""How commands read a configuration and print a result."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from blip_core.errors import ConfigError

if TYPE_CHECKING:
    from blip_core.config import BootstrapConfig


def load(path: Path, settings: list[str] | None, overrides: dict[str, Any]) -> "BootstrapConfig":
    """The configuration with --set's keys replaced, and then those of `overrides` that are not None."""
    from blip_core.config import load_config

    given: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: must be KEY=VALUE, such as pretrain.steps=500")
        given[key] = value
    # The texts of --set are YAML; those of the other options are meant as they stand, and JSON is YAML.
    given |= {key: json.dumps(value) for key, value in overrides.items() if value is not None}
    return load_config(path, given)


def print_report(config: "BootstrapConfig") -> None:
    """Prints the round's numbers as JSON."""
    from blip_core.evaluation.report import build_report
    from blip_core.workspace import Workspace

    print_json(build_report(Workspace.existing(config.workspace), config.round))


def show_rows(rows: Any, json: bool) -> None:
    """Prints an Arrow table: as JSON, or for people."""
    from flows.tables import print_rows, to_json

    if json:
        typer.echo(to_json(rows))
    else:
        print_rows(rows)


def print_json(value: Any) -> None:
    """Prints one JSON value on stdout."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
