"""What orchestration costs: `make orchestration`.

`capfilt annotate` with `engine: pool` over so many shards, at a Prefect server and a worker of its own, where the
annotator only copies parts that were made before (copying.py). Seconds a shard are those of all the rest: planning,
runs, process starts, the imports of each, polling, the record; CPU seconds are those of all but the database. Whether
the server's record is complete is asked of the server: every run and task has ended well, and every run's end is among
the events.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
import yaml
from copying import STOCK, annotate_batch
from machine import machine
from prefect.deployments.runner import EntrypointType
from prefect.settings import PREFECT_API_URL, temporary_settings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from services.postgres import postgres  # noqa: E402
from services.prefect import Server, Worker, redis_messaging  # noqa: E402
from services.program import Program  # noqa: E402
from services.redis import redis  # noqa: E402
from services.shards import COLOURS, make_shards  # noqa: E402

from blip_core.capfilt.parts import FailedShard  # noqa: E402
from blip_core.config import BootstrapConfig, load_config  # noqa: E402
from blip_core.med.architecture import Architecture  # noqa: E402
from blip_core.med.checkpoint import save_med  # noqa: E402
from blip_core.med.med import build_med  # noqa: E402
from blip_core.med.tokenizer import Tokenizer  # noqa: E402
from blip_core.workspace import Workspace  # noqa: E402
from tasks.annotate_batch import annotate_names  # noqa: E402

SIZES = (100, 1000, 13000)
DATABASES = ("sqlite", "postgres")
WORKERS = 2  # runs at a time
BATCH = 16
TARGET = 0.5  # seconds a shard
RECORD_SECONDS = 300.0
ENDED = "prefect.flow-run.Completed"


class Rows(NamedTuple):
    """What the server has stored."""

    flow_runs: int
    completed_flow_runs: int
    task_runs: int
    completed_task_runs: int
    events: int
    ends: int  # events that tell of a run's good end


def prepare(folder: Path, shards: int) -> Path:
    """A workspace with so many shards of one picture, and their true parts in the stock; returns a configuration."""
    models = folder / "model"
    if not models.exists():
        _save_model(models)
    work = folder / f"work-{shards}"
    path = folder / f"config-{shards}.yaml"
    values = {
        "workspace": str(work),
        "web": {"path": str(folder / "none.parquet")},
        "checkpoints": {"captioner": str(models), "filter": str(models)},
        "annotate": {"workers": 0},
        "generation": {"max_length": 5},
        "engine": "pool",
        "scale": {"shards_per_run": BATCH},
    }
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    names = make_shards(work, shards, 1)
    for result in annotate_names(config, names):
        assert not isinstance(result, FailedShard), result
    (work / STOCK).mkdir()
    for folder in (Workspace(work).round(1).annotations, Workspace(work).round(1).embeddings):
        folder.rename(work / STOCK / folder.name)
    return path


def _save_model(folder: Path) -> None:
    words = Tokenizer.train([f"a large {colour} square" for colour in COLOURS], 200, max_tokens=35)
    architecture = Architecture(16, 16, 32, 1, 2, 32, 1, 2, 16, 0.0, 0.0)
    torch.manual_seed(0)
    med = build_med(architecture, len(words), words.encode_id, words.decode_id)
    save_med(folder, med, architecture, words, {"origin": "a benchmark"})


@contextmanager
def platform(folder: Path, database: str) -> Iterator[tuple[Server, Worker]]:
    """A Prefect server on this database, with the copying deployment, and a worker of its pool."""
    folder.mkdir()
    with ExitStack() as stack:
        if database == "postgres":
            url = stack.enter_context(postgres()).url
            messages = redis_messaging(stack.enter_context(redis(folder)).port)
            server = Server(folder / "server", url, messages)
        else:
            server = Server(folder / "server")
        stack.enter_context(server).start()
        setup = [sys.executable, "-m", "flows", "setup-prefect", "--no-deploy", "--gpus", str(WORKERS)]
        subprocess.run(setup, cwd=ROOT, env=server.client, check=True, capture_output=True)
        with temporary_settings({PREFECT_API_URL: server.api}):
            annotate_batch.to_deployment(
                "capfilt", work_pool_name="gpu", tags=["capfilt"], entrypoint_type=EntrypointType.MODULE_PATH
            ).apply()
        modules = {"PYTHONPATH": str(Path(__file__).parent), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
        worker = Worker(server, "gpu", folder, WORKERS, modules)
        stack.enter_context(worker).start()
        yield server, worker


def measure(server: Server, worker: Worker, path: Path, shards: int) -> dict[str, Any]:
    """Runs the annotation and reads the server's record of it."""
    before = rows(server)
    began, used = time.monotonic(), _cpu_seconds(server, worker)
    command = [sys.executable, "-m", "flows", "annotate", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=server.client, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    cpu = _cpu_seconds(server, worker) - used
    if done.returncode:
        raise SystemExit(f"the annotation failed: {done.stderr[-2000:]}")
    config = load_config(path)
    runs = -(-shards // BATCH)
    stored, waited = _settled(server, before, runs)
    return {
        "shards": shards,
        "runs": runs,
        "seconds": round(seconds, 1),
        "seconds_per_shard": round(seconds / shards, 3),
        "cpu_seconds_per_shard": round(cpu / shards, 3),
        "parts": _parts(config),
        "record_seconds": round(waited, 1),
        "complete": _complete(stored, runs),
        **stored._asdict(),
    }


def _cpu_seconds(*programs: Program) -> float:
    """Of the conductors that have ended, of these programs, and of the runs that they started and that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime
    for program in programs:
        fields = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += sum(map(int, fields[11:15])) / os.sysconf(
            "SC_CLK_TCK"
        )  # its own and its children's, user and system
    return seconds


def _parts(config: BootstrapConfig) -> int:
    return sum(1 for _ in Workspace(Path(config.workspace)).round(1).annotations.glob("*.parquet"))


def _complete(stored: Rows, runs: int) -> bool:
    """Whether the conductor, its children and all tasks are stored with their ends, none missing."""
    wanted = runs + 1
    return (
        stored.flow_runs == stored.completed_flow_runs == stored.ends == wanted
        and stored.task_runs == stored.completed_task_runs == wanted  # a task for each child, and one that plans
    )


def _settled(server: Server, before: Rows, runs: int) -> tuple[Rows, float]:
    """What was stored since `before`, when it is complete or nothing has come for a while, and seconds waited."""
    began = time.monotonic()
    last, since = before, began
    while True:
        found = rows(server)
        now = time.monotonic()
        if found != last:
            last, since = found, now
        stored = Rows(*(after - standing for after, standing in zip(found, before, strict=True)))
        if _complete(stored, runs) or now - since > RECORD_SECONDS:
            return stored, now - began
        time.sleep(1)


def rows(server: Server) -> Rows:
    """The server's record, as its API counts it."""
    completed = {"state": {"type": {"any_": ["COMPLETED"]}}}
    since = {"occurred": {"since": "2020-01-01T00:00:00Z"}}
    return Rows(
        _ask(server, "flow_runs/count", {}),
        _ask(server, "flow_runs/count", {"flow_runs": completed}),
        _ask(server, "task_runs/count", {}),
        _ask(server, "task_runs/count", {"task_runs": completed}),
        _ask(server, "events/filter", {"filter": since, "limit": 1})["total"],
        _ask(server, "events/filter", {"filter": {**since, "event": {"name": [ENDED]}}, "limit": 1})["total"],
    )


def _ask(server: Server, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{server.api}/{path}", json=body, timeout=60, trust_env=False)
    answer.raise_for_status()
    return answer.json()


def show(found: list[dict[str, Any]]) -> None:
    """A table for people."""
    names = (
        "database",
        "shards",
        "runs",
        "seconds",
        "seconds_per_shard",
        "flow_runs",
        "task_runs",
        "events",
        "complete",
    )
    for words in [names, *([row[name] for name in names] for row in found)]:
        sys.stdout.write("  ".join(f"{word!s:>21}" for word in words) + "\n")


def main() -> None:
    """Measures each size on each database, and fails where the cost or the record is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--database", choices=DATABASES, nargs="+", default=list(DATABASES))
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    arguments = parser.parse_args()
    found = []
    for shards in arguments.shards:
        with tempfile.TemporaryDirectory(prefix="capfilt-orchestration-") as folder:
            path = prepare(Path(folder), shards)
            for database in arguments.database:
                sys.stderr.write(f"{database}: {shards} shards are ready\n")
                with platform(Path(folder) / database, database) as (server, worker):
                    found.append({"database": database, **measure(server, worker, path, shards)})
                    sys.stderr.write(f"{found[-1]}\n")
                shutil.rmtree(Workspace(Path(load_config(path).workspace)).round(1).root)
    if arguments.json:
        value = {"machine": machine(torch.device("cpu")), "workers": WORKERS, "figures": found}
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    else:
        show(found)
    bad = [row for row in found if not row["complete"] or row["seconds_per_shard"] > TARGET]
    if bad:
        raise SystemExit(f"over {TARGET} s a shard, or not all of it on record: {bad}")


if __name__ == "__main__":
    main()
