"""The engines local, pool and ray: the same bytes from each, and nothing lost when a part of one is killed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled
from services.prefect import Server, Worker
from services.ray import Ray, ray
from services.shards import make_shards

from blip_core.config import load_config
from blip_core.errors import ConfigError
from blip_core.workspace import Workspace
from flows.annotate import annotate

# processes that import torch, a dozen of them in some tests
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
SECONDS = 400.0
SHARDS, IMAGES = 4, 32
RUNS = SHARDS // 2
PRETRAIN = FlowRunFilterName(any_=["pretrain"])  # as runs are named that the conductor hands out

Answer = TypeVar("Answer")
Parts = dict[str, bytes]


class Bench(NamedTuple):
    """A server with the project's deployments, a worker for two GPUs, and the shards to annotate."""

    server: Server
    worker: Worker
    shards: Path
    models: dict[str, str]
    folder: Path

    def config(self, name: str, engine: str, **changes: Any) -> Path:
        """A configuration of its own workspace, with the shards in it."""
        work = self.folder / name
        shutil.copytree(self.shards, work / "work" / "shards")
        values = {
            "workspace": str(work / "work"),
            "web": {"path": str(work / "none.parquet")},
            "checkpoints": self.models,
            "annotate": {"workers": 0, "batch_size": 4, "candidates": 2},
            "engine": engine,
            "scale": {"shards_per_run": 2, "poll_seconds": 0.5},
        }
        path = work / "config.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    def start(self, command: str, config: Path, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "flows", command, str(config)],
            cwd=ROOT,
            env=self.server.client | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ask(self, question: Callable[[SyncPrefectClient], Answer]) -> Answer:
        with temporary_settings({PREFECT_API_URL: self.server.api}), get_client(sync_client=True) as client:
            return question(client)

    def runs(self, config: Path) -> list[FlowRun]:
        """The runs that annotate for a configuration."""
        workspace = yaml.safe_load(config.read_text())["workspace"]
        wanted = FlowRunFilter(name=FlowRunFilterName(like_="annotate-"))
        found = self.ask(lambda client: client.read_flow_runs(flow_run_filter=wanted))
        return [run for run in found if run.parameters["config"]["workspace"] == workspace]


@pytest.fixture(scope="module")
def bench(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    make_shards(folder / "drawn", SHARDS, IMAGES)
    models = {name: str(published / name) for name in ("captioner", "filter")}
    soon = {"PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "2"}
    with Server(folder / "server", settings=soon) as server:
        assert isinstance(server, Server)
        server.start()
        setup = [sys.executable, "-m", "flows", "setup-prefect", "--gpus", "2"]
        subprocess.run(setup, cwd=ROOT, env=server.client, check=True, capture_output=True)
        worker = Worker(server, "gpu", folder, limit=2)
        with worker.start():
            yield Bench(server, worker, folder / "drawn" / "shards", models, folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Ray]:
    with ray(2) as head:
        yield head


@pytest.fixture(scope="module")
def expected(bench: Bench) -> Parts:
    """What this process makes by itself."""
    config = bench.config("local", "local")
    ends_well(bench.start("annotate", config))
    return parts(config)


def ends_well(process: subprocess.Popen[str]) -> str:
    return ends(process, 0)


def ends(process: subprocess.Popen[str], status: int) -> str:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"has not ended: {process.communicate()[0]}")
    assert process.returncode == status, output
    return output


def annotations(config: Path) -> Path:
    return Workspace(Path(yaml.safe_load(config.read_text())["workspace"])).round(1).annotations


def parts(config: Path) -> Parts:
    """The bytes of annotations and embeddings."""
    made = annotations(config).parent
    return {
        str(path.relative_to(made)): path.read_bytes()
        for folder in ("annotations", "embeddings")
        for path in (made / folder).glob("*.parquet")
    }


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What the condition gives once it is true, which must be before the process ends."""
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def processes(variable: str, title: str = "") -> list[int]:
    """The processes with this in their environment, and this in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, words = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if variable.encode() in environment.split(b"\0") and title.encode() in words:
            found.append(int(folder.name))
    return found


def test_runs_in_a_work_pool_make_the_same_bytes(bench: Bench, expected: Parts) -> None:
    config = bench.config("pool", "pool")
    output = ends_well(bench.start("annotate", config))
    assert parts(config) == expected
    assert len(expected) == 2 * SHARDS
    assert sorted(len(run.parameters["names"]) for run in bench.runs(config)) == [2] * RUNS
    assert f"{SHARDS * IMAGES} of {SHARDS * IMAGES}" in output
    images, seconds = (annotations(config).parent / f"{name}.json" for name in ("images", "seconds"))
    assert yaml.safe_load(images.read_text()) == {"annotate": SHARDS * IMAGES}
    assert yaml.safe_load(seconds.read_text())["annotate"] > 0


def test_actors_of_a_ray_cluster_make_the_same_bytes(bench: Bench, expected: Parts, cluster: Ray) -> None:
    config = bench.config("ray", "ray", scale={"ray_address": cluster.address})
    ends_well(bench.start("annotate", config, **cluster.secret))
    assert parts(config) == expected


def test_a_killed_run_is_put_back_and_makes_only_what_is_missing(bench: Bench, expected: Parts) -> None:
    config = bench.config("killed", "pool", scale={"shards_per_run": 3, "poll_seconds": 0.5, "window": 1})
    conductor = bench.start("annotate", config)
    first: Path = wait_for(lambda: next(annotations(config).glob("*.parquet"), None), conductor)
    made = first.stat().st_mtime_ns
    (run,) = bench.runs(config)
    for process in processes(f"PREFECT__FLOW_RUN_ID={run.id}"):
        os.kill(process, signal.SIGKILL)
    output = ends_well(conductor)
    assert re.search(rf"run {run.name} crashed.*put back, time 1 of 3", output)
    assert parts(config) == expected
    assert first.stat().st_mtime_ns == made
    counts = {run.name: run.run_count for run in bench.runs(config)}
    assert counts[run.name] == 2
    assert len(counts) == 2


def test_a_conductor_that_was_killed_adopts_its_open_runs(bench: Bench, expected: Parts) -> None:
    config = bench.config("adopted", "pool")
    conductor = bench.start("annotate", config)
    wait_for(lambda: len(bench.runs(config)) == RUNS, conductor)
    conductor.kill()
    conductor.communicate()
    output = ends_well(bench.start("annotate", config))
    assert re.search(r"annotate: [12] runs of an earlier conductor are open", output)
    assert parts(config) == expected
    assert len(bench.runs(config)) == RUNS


def test_the_conductor_waits_while_the_server_is_away(bench: Bench, expected: Parts) -> None:
    config = bench.config("away", "pool")
    conductor = bench.start("annotate", config)
    wait_for(lambda: len(bench.runs(config)) == RUNS, conductor)
    bench.server.kill()
    time.sleep(10)
    bench.server.start()
    ends_well(conductor)
    assert parts(config) == expected


def test_who_cancels_the_conductor_cancels_its_runs(bench: Bench) -> None:
    slowly = {"workers": 0, "batch_size": 1, "candidates": 100}
    scale = {"shards_per_run": 1, "poll_seconds": 0.5}
    config = bench.config("cancelled", "pool", annotate=slowly, scale=scale)
    conductor = bench.start("annotate", config)
    wait_for(lambda: len(bench.runs(config)) == SHARDS, conductor)
    wait_for(lambda: any(run.run_count for run in bench.runs(config)), conductor)
    (parent,) = {run.parent_task_run_id for run in bench.runs(config)[:1]}
    task = bench.ask(lambda client: client.read_task_run(parent))
    bench.ask(lambda client: client.set_flow_run_state(task.flow_run_id, Cancelled(), force=True))
    output = ends(conductor, 1)
    assert re.search(r"its run annotate-\w+ cancelled", output)
    states = Counter(run.state_name for run in bench.runs(config))
    assert states.keys() <= {"Cancelled", "Completed"}
    assert states["Cancelled"] >= SHARDS - 2


def test_a_torn_shard_is_named_with_its_reason_and_the_others_are_done(bench: Bench, expected: Parts) -> None:
    config = bench.config("torn", "pool", scale={"shards_per_run": SHARDS, "poll_seconds": 0.5})
    torn = sorted((annotations(config).parents[2] / "shards").glob("*.parquet"))[1]
    torn.write_bytes(torn.read_bytes()[:-100])
    output = ends(bench.start("annotate", config), 1)
    assert re.search(rf"annotate: 1 of {SHARDS} shards failed.*{torn.stem}: \S+{torn.name}: is torn", output)
    assert parts(config) == {name: part for name, part in expected.items() if Path(name).name != torn.name}
    (run,) = bench.runs(config)
    assert (run.state_name, run.run_count) == ("ShardsFailed", 1)


def test_a_run_that_has_a_place_in_the_pool_itself_does_not_wait_for_another(bench: Bench, expected: Parts) -> None:
    config = bench.config("inside", "pool")
    parameters = {"config": load_config(config).model_dump(mode="json")}
    deployment = bench.ask(lambda client: client.read_deployment_by_name("annotate/capfilt"))
    run = bench.ask(lambda client: client.create_flow_run_from_deployment(deployment.id, parameters=parameters))
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    deadline = time.monotonic() + SECONDS
    while not (found := bench.ask(lambda client: client.read_flow_runs(flow_run_filter=wanted)[0])).state.is_final():  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(1)
    assert found.state_name == "Completed", bench.worker.log.read_text()[-3000:]
    assert parts(config) == expected
    assert bench.runs(config) == []


def test_a_killed_actor_is_replaced_and_its_shard_given_out_again(bench: Bench, expected: Parts, cluster: Ray) -> None:
    config = bench.config("actor", "ray", scale={"ray_address": cluster.address})
    conductor = bench.start("annotate", config, **cluster.secret)
    wait_for(lambda: next(annotations(config).glob("*.parquet"), None), conductor)
    secret = f"RAY_AUTH_TOKEN={cluster.secret['RAY_AUTH_TOKEN']}"
    os.kill(wait_for(lambda: processes(secret, "ray::Annotating.annotate"), conductor)[0], signal.SIGKILL)
    output = ends_well(conductor)
    assert "is given out again; its Ray actor died, 1 times" in output
    assert parts(config) == expected


def test_a_training_is_the_same_on_each_engine(bench: Bench, cluster: Ray, tiny_web: Path) -> None:
    tiny = yaml.safe_load((ROOT / "tests" / "orchestration" / "tiny.yaml").read_text())
    tiny["human"] = {"path": str(tiny_web / "human.parquet")}
    tiny["scale"] = {"poll_seconds": 0.5, "ray_address": cluster.address}
    digests = {}
    for engine in ("local", "pool", "ray"):
        config = bench.config(f"training-{engine}", engine, **tiny)
        ends_well(bench.start("pretrain", config, **cluster.secret))
        digests[engine] = yaml.safe_load((annotations(config).parent / "med" / "config.json").read_text())["digest"]
    assert len(set(digests.values())) == 1, digests
    runs = bench.ask(lambda client: client.read_flow_runs(flow_run_filter=FlowRunFilter(name=PRETRAIN)))
    assert [run.work_pool_name for run in runs] == ["gpu"]


def test_a_server_without_the_deployment_is_told_in_a_line(bench: Bench, prefect_server: None) -> None:
    with pytest.raises(ConfigError, match="engine: pool needs the deployment annotate-batch/capfilt"):
        annotate(load_config(bench.config("nowhere", "pool")))
