"""Memory: what a stream holds does not grow with the number of shards."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from blip_core.data.shards import SHARD_SCHEMA, write_shard

ROWS, SIDE = 50, 160  # 50 images of 77 kB: 3.8 MB a shard
MEGABYTE = 2**20

SCRIPT = """
    import pathlib, re, sys
    from blip_core.data.pairs import web_sources
    from blip_core.data.stream import PairStream
    from blip_core.data.transforms import eval_transform
    shards = sorted(pathlib.Path(sys.argv[1]).glob("*.parquet"))
    batches = PairStream(web_sources(shards), 50, eval_transform(4), 0).batches()
    seen = {image for _ in range(len(shards)) for image in next(batches).image_ids.tolist()}
    # ru_maxrss begins at what the parent had
    print(len(seen), int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Images of noise, which nothing compresses."""
    noise = np.random.default_rng(0).integers(0, 256, (ROWS, SIDE, SIDE, 3), dtype=np.uint8)
    rows = []
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "noise.bmp")
        data = (tmp_path / "noise.bmp").read_bytes()
        rows.append({"uid": f"{number:03}", "caption": "noise", "status": "ok", "image": data})
    write_shard(tmp_path / "shard.parquet", [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", ROWS)
    return tmp_path / "shard.parquet"


def peak(shard: Path, shards: int) -> int:
    """The most memory, in bytes, of a process that reads so many shards once."""
    folder = shard.parent / str(shards)
    folder.mkdir()
    for number in range(shards):
        os.link(shard, folder / f"{number:03}.parquet")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder)], capture_output=True, text=True, check=True
    )
    images, most = map(int, run.stdout.split())
    assert images == ROWS
    return most


def test_a_hundred_shards_take_hardly_more_memory_than_ten(shard: Path) -> None:
    size = shard.stat().st_size
    few, many = peak(shard, 10), peak(shard, 100)
    # Ten shards lie within the window of sixteen row groups and a hundred fill it: six more, and as much again for
    # what the allocators keep. Holding all would take ninety more.
    assert many - few < 12 * size, f"10 shards {few / MEGABYTE:.0f} MB, 100 shards {many / MEGABYTE:.0f} MB"
