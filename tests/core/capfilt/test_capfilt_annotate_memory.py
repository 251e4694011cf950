"""Memory: the peak of annotating grows neither with a shard's images nor with the number of shards."""

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from blip_core.data.shards import SHARD_SCHEMA, write_shard

FEW, MANY = 200, 2000
MEGABYTE = 2**20

SCRIPT = """
    import pathlib, sys, torch
    from blip_core.capfilt.annotate import annotate_shards
    from blip_core.capfilt.captioner import Captioner
    from blip_core.capfilt.filter import Filter
    from blip_core.capfilt.parts import AnnotateConfig, ShardJob
    from blip_core.med.decoding import GenerationConfig
    from blip_core.workspace import Round
    if __name__ == "__main__":
        torch.set_num_threads(1)
        captioner, filter, workers, target, *shards = sys.argv[1:]
        jobs = [ShardJob.of(Round(1, pathlib.Path(target)), pathlib.Path(shard)) for shard in shards]
        config = AnnotateConfig(workers=int(workers))
        models = Captioner.load(captioner), Filter.load(filter)
        results = list(annotate_shards(jobs, *models, config, GenerationConfig(max_length=2, min_length=1), 0))
        images = sum(result.images for result in results)
        # not getrusage, whose peak is at least that of the process which started this one
        (peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(images, sum(result.unscored for result in results), peak.split()[1])
"""


def jpegs(count: int) -> Iterator[bytes]:
    """Pictures of noise, each as large as a photograph of 400 pixels a side."""
    noise = np.random.default_rng(0)
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (240, 320, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=80)
        yield buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One of FEW images, and one of MANY."""
    folder = tmp_path_factory.mktemp("shards")
    rows = [
        {"uid": f"{place:05}", "caption": "a star", "status": "ok", "sha256": f"{place}", "image": data}
        for place, data in enumerate(jpegs(MANY))
    ]
    for count in (FEW, MANY):
        groups = [pa.Table.from_pylist(rows[start : start + 1000], SHARD_SCHEMA) for start in range(0, count, 1000)]
        groups[-1] = groups[-1].slice(0, min(count, 1000))
        write_shard(folder / f"{count}.parquet", groups, "settings", count)
    return folder / f"{FEW}.parquet", folder / f"{MANY}.parquet"


@pytest.fixture
def peak(checkpoints: tuple[Path, Path], tmp_path: Path) -> Callable[[int, list[Path]], int]:
    """The most memory, in bytes, of a process that annotates some shards."""
    (tmp_path / "program.py").write_text(textwrap.dedent(SCRIPT))

    def measure(workers: int, paths: list[Path]) -> int:
        target = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        command = [sys.executable, tmp_path / "program.py", *checkpoints, str(workers), target, *paths]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        images, unscored, kilobytes = map(int, run.stdout.split())
        assert images == sum(int(path.stem.partition("-")[0]) for path in paths)
        assert unscored < images  # a sampled text may be empty
        return kilobytes * 1024

    return measure


@pytest.mark.parametrize("workers", [0, 1])
def test_ten_times_the_images_take_hardly_more_memory_in_one_shard_or_in_ten(
    workers: int, shards: tuple[Path, Path], peak: Callable[[int, list[Path]], int], tmp_path: Path
) -> None:
    few, many = shards
    difference = many.stat().st_size - few.stat().st_size
    assert difference > 60 * MEGABYTE
    copies = [tmp_path / f"{FEW}-{number}.parquet" for number in range(10)]
    for copy in copies:
        os.link(few, copy)
    least = peak(workers, [few])
    for paths in ([many], copies):
        more = peak(workers, paths) - least
        assert more < difference / 4, f"{len(paths)} shards: {more / MEGABYTE:.0f} MB more, {least / MEGABYTE:.0f} MB"
