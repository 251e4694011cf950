"""What deployments take from files when they are deployed: prefect.yaml names these functions as build steps.

A step gives a dictionary whose values stand for the placeholders in prefect.yaml, so that the settings of a preset
are written once, in deployments/presets/. Imports no Prefect before it is needed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip_core.errors import ConfigError

if TYPE_CHECKING:
    from blip_core.config import BootstrapConfig
    from blip_core.scale import Engine

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deployments" / "presets"
# What has no default: where a preset does not name it, the form of the run asks for it.
_REQUIRED = (("workspace",), ("web", "path"))


def read_preset(preset: str, engine: "Engine" = "local", config: str = "") -> dict[str, Any]:
    """A deployment's default configuration, whole: {"config": settings as JSON has them}.

    Args:
        preset: the stem of a file in deployments/presets.
        engine: who does the work where the file does not say; a file that says `ray` is left its own.
        config: a configuration of one's own instead of the preset: a file, from the current folder.

    A relative workspace begins at the current folder, as everywhere. Raises ConfigError as `load_config` does.
    """
    path = Path(config).expanduser() if config else FOLDER / f"{preset}.yaml"
    if not config and not path.is_file():
        raise ConfigError(f"preset {preset}: not in {FOLDER}, which has {', '.join(_names())}")
    return {"config": _values(path, engine)}


def read_demo(engine: "Engine" = "local") -> dict[str, Any]:
    """The demo's configuration, with its workspace `capfilt-demo` in the current folder: {"config": settings}."""
    values = demo_config(str(Path("capfilt-demo").absolute()), 0).model_dump(mode="json")
    return {"config": values | {"engine": engine}}


def demo_config(workspace: str, seed: int) -> "BootstrapConfig":
    """The demo's settings, with its tables below the workspace, or on this machine where that is in a store."""
    from blip_core import scenes
    from blip_core.config import load_config
    from blip_core.stores import located, scratch_folder

    tables = scratch_folder(located(workspace)) / "scenes"
    given = {
        "workspace": json.dumps(workspace),
        "seed": seed,
        "web": {"path": str(tables / "urls.parquet"), "caption": "alt", "uid": "uid"},
        "human": {"path": str(tables / "human.parquet"), "uid": "uid"},
        "held_out": {"path": str(tables / "held_out.parquet"), "uid": "uid"},
        "truth": json.dumps(str(tables / "truth.parquet")),
    }
    return load_config(Path(scenes.__file__).with_name("demo.yaml"), given)


def read_schedule(deployment: str, slug: str) -> dict[str, bool]:
    """{"active": whether the schedule is on at the server}: deploying again leaves it as people turned it.

    Args:
        deployment: "flow/name"; one that is not there yet has its schedule off.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            schedules = client.read_deployment_by_name(deployment).schedules
        except ObjectNotFound:
            schedules = []
    return {"active": any(schedule.active for schedule in schedules if schedule.slug == slug)}


def _values(path: Path, engine: "Engine") -> dict[str, Any]:
    from blip_core.config import load_config, read_values

    given = read_values(path)
    missing = [key for key in _REQUIRED if _at(given, key) is None]
    values = load_config(path, {".".join(key): "to be given" for key in missing}).model_dump(mode="json")
    if "://" not in values["workspace"]:
        values["workspace"] = str(Path(values["workspace"]).expanduser().absolute())
    for *sections, last in missing:
        del _at(values, sections)[last]
    return values if values["engine"] == "ray" else values | {"engine": engine}


def _at(values: Any, key: Any) -> Any:
    """The value at a path of keys; None where there is none."""
    for part in key:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
