"""A workspace with shards of small drawn pictures, as a download would leave it, without the download."""

import hashlib
import io
from pathlib import Path

import pyarrow as pa
from PIL import Image

from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.files import fingerprint
from blip_core.workspace import Workspace

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def make_shards(root: Path, shards: int, images: int) -> list[str]:
    """Writes so many shards of so many distinct images each; returns the shards' names."""
    workspace = Workspace.open(root)
    names = [fingerprint("shard", number) for number in range(shards)]
    for number, name in enumerate(names):
        rows = [_row(number * images + index) for index in range(images)]
        write_shard(workspace.shard(name), [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "drawn", images)
    return names


def _row(number: int) -> dict[str, object]:
    buffer = io.BytesIO()
    colour = (number % 251, number // 251 % 251, 40 * (number % 6))
    Image.new("RGB", (40, 40), colour).save(buffer, "PNG")
    data = buffer.getvalue()
    return {
        "uid": f"{number:08d}",
        "url": f"http://web.test/{number}.png",
        "caption": f"a large {COLOURS[number % len(COLOURS)]} square",
        "status": "ok",
        "width": 40,
        "height": 40,
        "original_width": 40,
        "original_height": 40,
        "sha256": hashlib.sha256(data).hexdigest(),
        "image": data,
    }
