"""prefect.yaml deploys every flow, by a module entrypoint that loads."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from blip_core.config import BootstrapConfig

ROOT = Path(__file__).parents[2]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
FLOWS = (
    "annotate", "bootstrap", "clean", "demo", "download", "evaluation", "finetune", "pretrain", "publish", "report",
    "retrain",
)  # fmt: skip


def test_every_flow_has_one_deployment() -> None:
    assert sorted(deployment["entrypoint"] for deployment in DEPLOYMENTS) == [f"flows.{name}.{name}" for name in FLOWS]
    assert {path.stem for path in (ROOT / "flows").glob("*.py") if "@flow" in path.read_text()} == set(FLOWS)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["entrypoint"])
def test_a_deployment_loads_and_takes_the_configuration(deployment: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert flow.name == deployment["entrypoint"].split(".")[1]
    assert flow.description
    assert deployment["description"]
    assert deployment["work_pool"]["name"] == "capfilt"
    assert "config" in flow.parameters.properties
    scenes = {"scenes": {}} if "scenes" in flow.parameters.properties else {}
    flow.validate_parameters({"config": minimal(), **scenes})


def minimal() -> dict[str, Any]:
    values = {"workspace": "w", "web": {"path": "urls.parquet"}, "human": {"path": "human.parquet"}}
    return BootstrapConfig.model_validate(values).model_dump(mode="json")
