"""Workers that are killed, and workers at the same shard: in the end one whole part stands, and nothing else."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from blip_core.capfilt.annotate import annotate_shard
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig
from blip_core.med.decoding import GenerationConfig

IMAGES = 12
CONFIG = AnnotateConfig(candidates=2, batch_size=4, workers=0)
GENERATION = GenerationConfig(max_length=5, min_length=1)

# Says after every batch how many images are done, and goes on when it is told to.
WORKER = f"""
    import pathlib, sys
    from blip_core.capfilt.annotate import annotate_shards
    from blip_core.capfilt.captioner import Captioner
    from blip_core.capfilt.filter import Filter
    from blip_core.capfilt.parts import AnnotateConfig, ShardJob
    from blip_core.med.decoding import GenerationConfig

    def tell(progress):
        print(progress.done, flush=True)
        sys.stdin.readline()

    if __name__ == "__main__":
        captioner, filter, shard, target = map(pathlib.Path, sys.argv[1:])
        models = Captioner.load(captioner), Filter.load(filter)
        config, generation = {CONFIG!r}, {GENERATION!r}
        for result in annotate_shards([ShardJob(shard, target)], *models, config, generation, 7, tell):
            print(result.candidates, result.skipped, flush=True)
"""

Start = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def shard(make_shard: Callable[..., Path]) -> Path:
    return make_shard("shard", range(IMAGES))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "annotations" / "shard.parquet"


@pytest.fixture
def start(checkpoints: tuple[Path, Path], shard: Path, target: Path, tmp_path: Path) -> Start:
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    command = [sys.executable, str(tmp_path / "worker.py"), *map(str, (*checkpoints, shard, target))]
    return lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def go_on(worker: subprocess.Popen[str]) -> str:
    """Lets a worker take one more step, and returns what it says then."""
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return read(worker)


def hidden(target: Path) -> list[Path]:
    return [path for path in target.parent.iterdir() if path != target]


@pytest.fixture
def expected(shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]) -> bytes:
    """What one worker alone writes."""
    annotate_shard(shard, tmp_path / "alone.parquet", *models, CONFIG, GENERATION, 7)
    return (tmp_path / "alone.parquet").read_bytes()


def test_a_killed_worker_leaves_no_part_and_the_next_one_removes_what_it_left(
    start: Start, target: Path, expected: bytes
) -> None:
    with start() as killed:
        assert (read(killed), go_on(killed)) == ("4", "8")
        killed.send_signal(signal.SIGKILL)
    assert not target.exists()
    [left] = hidden(target)
    with start() as successor:
        assert read(successor) == "4"
        assert not left.exists()
        assert len(hidden(target)) == 1
        assert (go_on(successor), go_on(successor)) == ("8", "12")
        assert go_on(successor) == "36 False"
    assert target.read_bytes() == expected
    assert hidden(target) == []


def test_a_zombie_and_its_successor_at_the_same_shard_end_with_one_whole_part(
    start: Start, target: Path, expected: bytes
) -> None:
    with start() as zombie, start() as successor:
        assert (read(zombie), read(successor)) == ("4", "4")
        assert len(hidden(target)) == 2
        for done in ("8", "12"):
            assert (go_on(zombie), go_on(successor)) == (done, done)
        assert go_on(successor) == "36 False"
        assert target.read_bytes() == expected
        assert go_on(zombie) == "36 False"
    assert target.read_bytes() == expected
    assert hidden(target) == []


def test_what_a_killed_worker_left_goes_even_where_nothing_is_left_to_do(
    start: Start, target: Path, expected: bytes
) -> None:
    with start() as killed, start() as living:
        assert (read(killed), read(living)) == ("4", "4")
        for _ in range(3):
            last = go_on(living)
        assert last == "36 False"
        killed.send_signal(signal.SIGKILL)
    assert len(hidden(target)) == 1
    with start() as successor:
        assert read(successor) == "36 True"
    assert hidden(target) == []
    assert target.read_bytes() == expected
