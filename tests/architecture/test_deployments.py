"""prefect.yaml deploys every flow into the pools that there are, and takes its parameters from the presets."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from blip_core.config import BootstrapConfig, load_config
from flows.automations import HEARTBEAT_SECONDS, RERUN_TAG, TAG
from flows.presets import FOLDER, read_preset
from flows.setup_prefect import KUBERNETES_START_SECONDS

ROOT = Path(__file__).parents[2]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
BY_FLOW = {deployment["entrypoint"].rpartition(".")[2]: deployment for deployment in DEPLOYMENTS}
FLOWS = {path.stem for path in (ROOT / "flows").glob("*.py") if "@flow" in path.read_text()}
CYCLES = {"bootstrap", "clean", "demo", "re_bootstrap"}
ON_GPUS = {"pretrain", "finetune", "annotate", "annotate_batch", "retrain"}


def default_config(deployment: dict[str, Any]) -> dict[str, Any]:
    """What the deployment's build steps put in the place of "{{ config }}"."""
    outputs: dict[str, Any] = {}
    for step in deployment["build"]:
        (name, inputs), *_ = step.items()
        module, function = name.rsplit(".", 1)
        if function in ("read_preset", "read_demo"):
            outputs |= getattr(import_module(module), function)(
                **{**inputs, "config": ""} if "config" in inputs else inputs
            )
    return outputs["config"]


def test_every_flow_has_one_deployment() -> None:
    assert sorted(deployment["entrypoint"] for deployment in DEPLOYMENTS) == [
        f"flows.{name}.{name}" for name in sorted(FLOWS)
    ]


@pytest.mark.parametrize("name", BY_FLOW)
def test_a_deployment_loads_and_its_default_parameters_need_no_more_than_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    deployment = BY_FLOW[name]
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert flow.name == name.replace("_", "-")
    assert flow.description
    assert deployment["description"]
    assert deployment["name"] == "capfilt"
    assert deployment["enforce_parameter_schema"]
    assert deployment["parameters"]["config"] == "{{ config }}"
    config = default_config(deployment)
    named = {"workspace": "w", **config, "web": {"path": "urls.parquet", **config["web"]}}
    BootstrapConfig.model_validate(named)
    assert "config" in flow.parameters.properties


@pytest.mark.parametrize("name", BY_FLOW)
def test_work_on_gpus_is_in_their_pool_and_cycles_only_conduct(name: str) -> None:
    deployment = BY_FLOW[name]
    assert deployment["work_pool"]["name"] == ("gpu" if name in ON_GPUS else "cpu")
    assert deployment["work_pool"]["work_queue_name"] == ("batches" if name == "annotate_batch" else "default")
    assert default_config(deployment)["engine"] == ("pool" if name in CYCLES else "local")


@pytest.mark.parametrize("name", BY_FLOW)
def test_automations_find_what_they_watch(name: str) -> None:
    deployment = BY_FLOW[name]
    assert TAG in deployment["tags"]
    assert (RERUN_TAG in deployment["tags"]) == (name != "annotate_batch")
    environment = deployment["work_pool"]["job_variables"]["env"]
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_SECONDS)
    assert environment["DO_NOT_TRACK"] == "1"


def test_a_preset_is_read_whole_and_only_the_engine_is_the_deployments(tmp_path: Path) -> None:
    read = read_preset("clean", "pool")["config"]
    loaded = load_config(FOLDER / "clean.yaml", {"web.path": "urls.parquet"}).model_dump(mode="json")
    assert read["engine"] == "pool"
    assert "path" not in read["web"]
    assert Path(read["workspace"]) == Path.cwd() / "capfilt-clean"
    same = set(loaded) - {"engine", "web", "workspace"}
    assert {key: read[key] for key in same} == {key: loaded[key] for key in same}


def test_a_configuration_of_ones_own_takes_the_presets_place(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("workspace: s3://bucket/work\nweb: {path: urls.csv}\npublish: {where: itm_score > 0.7}\nseed: 5\n")
    read = read_preset("clean", "pool", str(mine))["config"]
    assert read["workspace"] == "s3://bucket/work"
    assert read["web"]["path"] == str(tmp_path / "urls.csv")
    assert read["publish"]["where"] == "itm_score > 0.7"
    assert (read["seed"], read["engine"]) == (5, "pool")
    mine.write_text("engine: ray\n")
    assert read_preset("clean", "pool", str(mine))["config"]["engine"] == "ray"


def test_the_weekly_round_waits_to_be_turned_on_and_runs_one_at_a_time() -> None:
    deployment = BY_FLOW["re_bootstrap"]
    (schedule,) = deployment["schedules"]
    assert schedule["slug"] == "weekly"
    assert len(schedule["cron"].split()) == 5
    assert schedule["cron"].split()[2:4] == ["*", "*"]
    assert schedule["cron"].split()[4].isdigit()
    assert schedule["timezone"]
    limit = deployment["concurrency_limit"]
    assert (limit["limit"], limit["collision_strategy"]) == (1, "ENQUEUE")
    assert limit["grace_period_seconds"] >= KUBERNETES_START_SECONDS
    steps = [step for step in deployment["build"] if "flows.presets.read_schedule" in step]
    assert steps[0]["flows.presets.read_schedule"]["deployment"] == "re-bootstrap/capfilt"
    assert schedule["active"] == f"{{{{ {steps[0]['flows.presets.read_schedule']['id']}.active }}}}"
