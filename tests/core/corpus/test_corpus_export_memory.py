"""Memory: what an export holds does not grow with the corpus, be it of shards or of human pairs."""

import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.corpus.schemas import CORPUS_SCHEMA, CORPUS_VERSION, write_part
from blip_core.corpus.selection import publish_human
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.data.tables import PairTable
from blip_core.workspace import Workspace

ROWS, SIDE = 50, 300  # 50 images of 270 kB: 13.5 MB a shard, or a table of human pairs
FEW, MANY = 8, 40
MEGABYTE = 2**20

SCRIPT = """
    import pathlib, re, sys
    from blip_core.corpus.export import export_corpus
    from blip_core.data.tables import PairTable
    from blip_core.workspace import Workspace
    human = PairTable(sys.argv[4]) if len(sys.argv) > 4 else None
    workspace = Workspace.existing(sys.argv[1])
    summary = export_corpus(workspace, pathlib.Path(sys.argv[2]), sys.argv[3], shard_size=60_000_000, human=human)
    print(summary.pairs, int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024)
"""


def noise(number: int) -> bytes:
    """An image that nothing compresses."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def of_shards(folder: Path, shards: int) -> list[str]:
    workspace = Workspace.open(folder / "work")
    images = [noise(number) for number in range(ROWS)]
    for number in range(shards):
        name = f"{number:016x}"
        uids = [f"{name}{row:03}" for row in range(ROWS)]
        rows = [{"uid": uid, "status": "ok", "image": image} for uid, image in zip(uids, images, strict=True)]
        write_shard(workspace.shard(name), [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", ROWS)
        kept = [{"uid": uid, "shard": name, "text": "noise", "source": "web", "candidate": 0} for uid in uids]
        part = workspace.round(1).corpus / f"{name}.parquet"
        write_part(part, pa.Table.from_pylist(kept, CORPUS_SCHEMA), CORPUS_VERSION, "mark")
    return [str(workspace.root)]


def of_human_pairs(folder: Path, times: int) -> list[str]:
    workspace = Workspace.open(folder / "work")
    workspace.shards.mkdir()
    human = PairTable(str(folder / "human.parquet"))
    schema = pa.schema({"image": pa.binary(), "caption": pa.string()})
    with pq.ParquetWriter(human.path, schema) as writer:
        for number in range(times):
            images = [noise(number * ROWS + row) for row in range(ROWS)]
            writer.write_table(pa.table({"image": images, "caption": ["noise"] * ROWS}, schema))
    publish_human(human, workspace.round(1).corpus, 1)
    return [str(workspace.root), human.path]


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
@pytest.mark.parametrize("make", [of_shards, of_human_pairs])
def test_five_times_the_images_take_hardly_more_memory(
    make: Callable[[Path, int], list[str]], format: str, tmp_path: Path
) -> None:
    peaks = []
    for times in (FEW, MANY):
        folder = tmp_path / str(times)
        folder.mkdir()
        root, *human = make(folder, times)
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), root, str(folder / "out"), format, *human]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        pairs, peak = map(int, run.stdout.split())
        assert pairs == times * ROWS
        peaks.append(peak)
    more = (MANY - FEW) * ROWS * SIDE * SIDE * 3
    assert more > 400 * MEGABYTE
    assert peaks[1] - peaks[0] < more / 4, f"{[peak // MEGABYTE for peak in peaks]} MB"
