"""Random models with opinions, and shards made by hand."""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.med.architecture import Architecture
from blip_core.med.checkpoint import save_med
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer


class Checkpoints(NamedTuple):
    """Folders of a Captioner and a Filter, which see images of different sizes: 16 and 24 pixels."""

    captioner: Path
    filter: Path


def checkpoint(folder: Path, seed: int, image_size: int) -> Path:
    words = Tokenizer.train(["a red circle", "two green rings", "a blue square under a star"], 100, 12)
    architecture = Architecture(image_size, 8, 32, 1, 2, 32, 1, 2, 16, 0.0, 0.0)
    torch.manual_seed(seed)
    med = build_med(architecture, len(words), words.encode_id, words.decode_id)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        special = [words.pad_id, words.start_id, words.encode_id, words.decode_id]
        med.text.head_bias[special] = -100.0
    save_med(folder, med, architecture, words, {})
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("models")
    return Checkpoints(checkpoint(root / "captioner", 1, 16), checkpoint(root / "filter", 2, 24))


@pytest.fixture(scope="session")
def models(checkpoints: Checkpoints) -> tuple[Captioner, Filter]:
    return Captioner.load(checkpoints.captioner), Filter.load(checkpoints.filter)


def picture(number: int) -> bytes:
    """A picture of noise that no other number has."""
    noise = np.random.default_rng(number).integers(0, 256, (18, 22, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


WriteShard = Callable[..., Path]


@pytest.fixture
def make_shard(tmp_path: Path) -> WriteShard:
    """Writes shards/<name>.parquet: one row for each image, named a0, a1 ..., with the text 'a star'."""

    def make(name: str, images: Sequence[bytes | int | None], **changes: Any) -> Path:
        rows = []
        for place, image in enumerate(images):
            data = picture(image) if isinstance(image, int) else image
            row = {"uid": f"a{place:05}", "url": f"http://x/{place}", "caption": "a star", "image": data}
            digest = hashlib.sha256(data or b"").hexdigest()
            rows.append(row | {"status": "ok", "sha256": digest} | changes)
        path = tmp_path / "shards" / f"{name}.parquet"
        write_shard(path, [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", len(rows))
        return path

    return make
