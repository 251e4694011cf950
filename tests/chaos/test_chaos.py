"""A `bootstrap` on the whole platform with faults at random moments ends with the corpus of an unbroken run.

CAPFILT_CHAOS_SEEDS is how many seeds are run, CAPFILT_CHAOS_SEED the first of them, and CAPFILT_CHAOS_OUTPUT a file
that gets one line of JSON for each. docs/reliability.md tells what a fault is, and what follows from it.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from services.disk import can_mount, small_disk
from services.faults import FAULTS, Stage, running_child
from services.platform import Platform, platform, processes_of
from services.prefect import QUIET
from services.web import Mood, Web, web

from blip_core.scenes.web import ScenesConfig, make_scenes, url_table
from blip_core.workspace import Workspace
from flows.automations import HEARTBEAT_SECONDS, ensure_automations

TINY = Path(__file__).parents[1] / "orchestration" / "tiny.yaml"
FIRST_SEED = int(os.environ.get("CAPFILT_CHAOS_SEED", "0"))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("CAPFILT_CHAOS_SEEDS", "1")))
MOODS: tuple[Mood, ...] = ("429", "500", "slow", "cut")
# Shorter than setup-prefect's own, so that a seed takes minutes; Prefect's heartbeat cannot be made shorter.
SILENCE_SECONDS, START_SECONDS, REST_SECONDS = 1.5 * HEARTBEAT_SECONDS, 60.0, 15.0
RECOVERY_SECONDS = 300.0  # within which a run that died runs again by itself
WORK_SECONDS = 60.0  # of a cycle's work, over which the moments are spread; it takes more
MEGABYTES = 128
ROWS = 120


class Scene(NamedTuple):
    """What all seeds have in common."""

    web: Web
    platform: Platform
    values: dict[str, Any]  # of the configuration, but for the workspace
    unbroken: Workspace


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The web, the platform, and a workspace in which nothing went wrong, made by this machine alone."""
    folder = tmp_path_factory.mktemp("chaos")
    paths = make_scenes(
        folder / "web",
        ScenesConfig(
            web_images=ROWS, human_pairs=40, held_out=12, dead_links=3, non_images=1, truncated=1, oversized=1
        ),
    )
    with web(paths.folder) as site:
        values = yaml.safe_load(TINY.read_text()) | {
            "download": {
                "rows_per_shard": 40,
                "image_size": 64,
                "processes": 1,
                "threads": 8,
                "retries": 8,
                "allow_private_networks": True,
            },
            "web": {"path": str(url_table(paths, site.address, folder / "urls.parquet")), "caption": "alt"},
            "human": {"path": str(paths.human), "uid": "uid"},
            "held_out": {"path": str(paths.held_out), "uid": "uid"},
            "truth": str(paths.truth),
            "engine": "pool",
            "scale": {"poll_seconds": 1.0, "shards_per_run": 2},
        }
        values["web"]["uid"] = "uid"
        unbroken = Workspace(folder / "unbroken")
        config = write_config(folder / "config.yaml", values | {"workspace": str(unbroken.root)})
        command = [sys.executable, "-m", "flows", "bootstrap", str(config), "--set", "engine=local"]
        steady = subprocess.Popen(command, env=os.environ | QUIET)
        with platform(folder, config, {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}) as running:
            running.ask(lambda client: ensure_automations(client, SILENCE_SECONDS, START_SECONDS, REST_SECONDS))
            assert steady.wait() == 0
            yield Scene(site, running, values, unbroken)


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


class Cycle:
    """One run of the cycle, watched; where it has ended badly it is put back as a person does."""

    def __init__(self, platform: Platform, run: UUID) -> None:
        self.platform = platform
        self.run = run
        self.retries = 0
        self.worked = 0.0  # seconds in which its process was at work
        self._looked = time.monotonic()

    def ended(self) -> bool:
        """Looks once."""
        state = self.platform.state(self.run)
        now = time.monotonic()
        if state.is_running() and processes_of(self.run):
            self.worked += now - self._looked
        self._looked = now
        if state.is_failed() or (state.is_crashed() and _age(state.timestamp) > 2 * REST_SECONDS + START_SECONDS):
            self.retries += 1
            assert self.retries <= 3, f"{state}\n{self.platform.logs()}"
            self.platform.retry(self.run)
        return state.is_completed()

    def wait(self, reached: Callable[[], bool]) -> bool:
        """Whether it came true before the end of the cycle."""
        deadline = time.monotonic() + 2 * RECOVERY_SECONDS
        while not reached():
            if self.ended():
                return False
            state = self.platform.state(self.run)
            assert time.monotonic() < deadline, (
                f"{state.name}: {self.platform.history(self.run)}\n{self.platform.logs()}"
            )
            time.sleep(0.5)
        return True

    def at_work(self, *runs: UUID) -> bool:
        """Whether the cycle runs, and these runs do or are done."""
        if not self._lives(self.run):
            return False
        return all(self._lives(run) or self.platform.state(run).is_completed() for run in runs)

    def _lives(self, run: UUID) -> bool:
        return self.platform.state(run).is_running() and processes_of(run) != []


def _age(moment: datetime) -> float:
    return (datetime.now(UTC) - moment).total_seconds()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_cycle_with_faults_at_random_moments_ends_as_an_unbroken_one(scene: Scene, seed: int, tmp_path: Path) -> None:
    say(f"CAPFILT_CHAOS_SEED={seed}")
    chance = random.Random(seed)
    began, started = time.monotonic(), datetime.now(UTC)
    with ExitStack() as stack:
        small = stack.enter_context(small_disk(tmp_path / "disk", MEGABYTES)) if can_mount() else None
        workspace = Workspace((small or tmp_path) / "workspace")
        values = scene.values | {"workspace": str(workspace.root)}
        mood = plan_mood(scene.web, chance)
        cycle = Cycle(scene.platform, scene.platform.start("bootstrap", {"config": values}))
        line: dict[str, Any] = {"seed": seed, "web": mood, "faults": [], "result": "failed"}
        try:
            strike_faults(cycle, small, chance, line)
            assert not cycle.wait(lambda: False)
            line |= {"seconds": round(time.monotonic() - began, 1), "retries_by_a_person": cycle.retries}
            line |= {"run_count": scene.platform.run(cycle.run).run_count}
            check_next_run(scene, workspace, write_config(tmp_path / "config.yaml", values))
            check_rows(workspace, scene.unbroken)
            check_record(scene.platform, started)
            line["result"] = "the corpus is that of an unbroken run"
        finally:
            mood["mistreated"] = scene.web.mistreated
            tell(line)


@pytest.mark.timeout(1200)
def test_a_cancelled_cycle_stops_its_processes_and_the_next_one_goes_on_from_there(
    scene: Scene, tmp_path: Path
) -> None:
    started = datetime.now(UTC)
    workspace = Workspace(tmp_path / "workspace")
    values = scene.values | {"workspace": str(workspace.root)}
    # Long enough to be cancelled in: the server looks for children of cancelled runs every 20 s.
    values["pretrain"] = values["pretrain"] | {"steps": 2000}
    cancelled = Cycle(scene.platform, scene.platform.start("bootstrap", {"config": values}))
    child = running_child(Stage(scene.platform, cancelled.run, None, random.Random()))
    assert child is not None
    scene.platform.cancel(cancelled.run)
    for run in (cancelled.run, child.id):
        wait_for(lambda run=run: scene.platform.state(run).is_cancelled(), lambda run=run: scene.platform.history(run))
        wait_for(lambda run=run: processes_of(run) == [])
    check_record(scene.platform, started)
    before = parts_of(workspace)
    assert before
    run_next(scene, write_config(tmp_path / "config.yaml", values))
    assert {name: parts_of(workspace)[name] for name in before} == before
    assert left_behind(workspace) == []
    assert rows_of(workspace.shards) == rows_of(scene.unbroken.shards)
    annotations, expected = (rows_of(each.round(1).annotations) for each in (workspace, scene.unbroken))
    assert list(annotations) == list(expected)
    for name, rows in annotations.items():  # of another MED, and so with other scores
        assert rows.select(["uid", "candidate"]).equals(expected[name].select(["uid", "candidate"]))
    assert list(rows_of(workspace.round(1).corpus)) == list(rows_of(scene.unbroken.round(1).corpus))


def plan_mood(site: Web, chance: random.Random) -> dict[str, Any]:
    """The web will misbehave for a while from some moment of the download on."""
    mood, after, seconds = chance.choice(MOODS), chance.randrange(ROWS), round(chance.uniform(3, 10), 1)
    site.recover()
    site.misbehave(mood, after, seconds)
    return {"mood": mood, "after_requests": after, "for_seconds": seconds}


def strike_faults(cycle: Cycle, small: Path | None, chance: random.Random, line: dict[str, Any]) -> None:
    """Strikes two faults, one after the other, and notes what each was, when, and how long until work went on."""
    first = list(FAULTS)[line["seed"] % len(FAULTS)]
    names = [first, chance.choice([name for name in FAULTS if name != first])]
    moments = sorted(round(chance.uniform(0, WORK_SECONDS), 1) for _ in names)
    for name, moment in zip(names, moments, strict=True):
        fault: dict[str, Any] = {"fault": name, "after_seconds_of_work": moment}
        line["faults"].append(fault)
        if not cycle.wait(lambda moment=moment: cycle.worked >= moment and cycle.at_work()):
            fault |= {"what": "came too late"}
            continue
        fault |= {"state": cycle.platform.state(cycle.run).name}
        struck = FAULTS[name](Stage(cycle.platform, cycle.run, small, chance))
        fault |= {"what": struck.what}
        over = time.monotonic()
        cycle.wait(lambda runs=struck.runs: cycle.at_work(*runs))
        fault |= {"seconds_to_recovery": round(time.monotonic() - over, 1)}
        assert fault["seconds_to_recovery"] < RECOVERY_SECONDS


def check_next_run(scene: Scene, workspace: Workspace, config: Path) -> None:
    """The next run finds everything done, makes nothing again, and nothing is left of what was killed."""
    before = parts_of(workspace)
    run_next(scene, config)
    assert parts_of(workspace) == before
    assert left_behind(workspace) == []
    assert sorted(before) == sorted(parts_of(scene.unbroken))


def run_next(scene: Scene, config: Path) -> None:
    """The documented command; it stays on this machine, which is sooner and makes the same."""
    done = scene.platform.capfilt("bootstrap", config, "--set", "engine=local")
    assert done.returncode == 0, done.stderr


def parts_of(workspace: Workspace) -> dict[str, tuple[int, int, int]]:
    """What stands under a final name, with inode, size and time of writing."""
    made = workspace.round(1)
    models = (made.med, made.captioner, made.filter, made.retrained, made.retrained_raw)
    folders = (workspace.shards, made.annotations, made.embeddings, made.corpus, *models)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {
        str(path.relative_to(workspace.root)): (state.st_ino, state.st_size, state.st_mtime_ns)
        for path in files
        if (state := path.stat())
    }


def left_behind(workspace: Workspace) -> list[Path]:
    """What lies under a temporary name, or in a folder of such a name."""
    return [
        path
        for path in workspace.root.rglob("*")
        if (path.name.endswith(".tmp") and path.name != ".tmp") or path.parent.name in (".tmp", ".plans")
    ]


def check_rows(workspace: Workspace, unbroken: Workspace) -> None:
    """Part for part, and row for row: images, annotations, corpus."""
    made, expected = workspace.round(1), unbroken.round(1)
    for folder, other in (
        (workspace.shards, unbroken.shards),
        (made.annotations, expected.annotations),
        (made.embeddings, expected.embeddings),
        (made.corpus, expected.corpus),
    ):
        parts, others = rows_of(folder), rows_of(other)
        assert list(parts) == list(others)
        for name, rows in parts.items():
            assert rows.equals(others[name]), f"{folder.name}/{name}"
    assert sum(rows.num_rows for rows in rows_of(made.corpus).values()) > 0


def rows_of(folder: Path) -> dict[str, pa.Table]:
    return {part.name: pq.read_table(part).replace_schema_metadata() for part in sorted(folder.glob("*.parquet"))}


def check_record(platform: Platform, started: datetime) -> None:
    """No run is said to be at work, and none is."""

    def unfinished() -> list[Any]:
        runs = platform.runs_since(started)
        return [(run.name, run.state_name, run.tags) for run in runs if run.state is None or not run.state.is_final()]

    wait_for(lambda: not unfinished(), unfinished)

    def processes() -> list[int]:
        return [process for run in platform.runs_since(started) for process in processes_of(run.id)]

    wait_for(lambda: not processes(), processes)


def wait_for(reached: Callable[[], object], found: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + RECOVERY_SECONDS
    while not reached():
        assert time.monotonic() < deadline, f"waited for {RECOVERY_SECONDS} s: {found()}"
        time.sleep(0.5)


def tell(line: dict[str, Any]) -> None:
    """Prints a seed's line, and adds it to the file."""
    text = json.dumps(line)
    say(text)
    if path := os.environ.get("CAPFILT_CHAOS_OUTPUT"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a") as file:
            file.write(text + "\n")


def say(text: str) -> None:
    """Prints a line, which pytest shows with -s and where the test fails."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
