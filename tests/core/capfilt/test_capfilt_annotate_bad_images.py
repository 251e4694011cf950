"""Images as the web has them, each through a shard: annotated where they can be read, and else a row with a reason."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.capfilt.annotate import annotate_shard
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig
from blip_core.data.shards import REASONS
from blip_core.med.decoding import GenerationConfig

GENERATION = GenerationConfig(max_length=4, min_length=1)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    """Whose first frame is PICTURE in a palette, and the second one black."""
    return encoded(PICTURE.quantize(), kind, save_all=True, append_images=[Image.new("L", PICTURE.size)], duration=99)


READABLE = {
    "animated GIF": animated("GIF"),
    "animated WebP": animated("WEBP"),
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "CMYK TIFF": encoded(PICTURE.convert("CMYK"), "TIFF"),
    "LAB": encoded(PICTURE.convert("LAB"), "TIFF"),
    "16 bits": encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG"),
    "palette with transparency": encoded(PICTURE.quantize(), "PNG", transparency=3),
    "grey with alpha": encoded(PICTURE.convert("LA"), "PNG"),
    "black and white": encoded(PICTURE.convert("1"), "TIFF", compression="group4"),
    "one pixel": encoded(Image.new("RGB", (1, 1), "red"), "GIF"),
    "a line": encoded(Image.new("RGB", (5000, 1), "red"), "PNG"),
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
}
UNREADABLE = {
    "no bytes": (b"", "not_an_image"),
    "null": (None, "not_an_image"),
    "a page": (b"<html>gone</html>", "not_an_image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not_an_image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not_an_image"),
    "JPEG cut short": (encoded(PICTURE, "JPEG")[:-200], "truncated"),
    "PNG cut short": (encoded(PICTURE, "PNG")[:-200], "truncated"),
    "WebP cut short": (encoded(PICTURE, "WEBP")[:-200], "unreadable"),
    "spoilt PNG": (encoded(PICTURE, "PNG")[:100] + bytes(300) + encoded(PICTURE, "PNG")[400:], "unreadable"),
    "bomb": (encoded(Image.new("1", (16_000, 16_000)), "PNG"), "too_large"),
    "larger bomb": (encoded(Image.new("1", (40_000, 40_000)), "PNG"), "too_large"),
}


@pytest.mark.parametrize("workers", [0, 1])
def test_every_image_has_its_rows_and_what_cannot_be_read_its_reason(
    workers: int, make_shard: Callable[..., Path], tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    images = [*READABLE.values(), *(data for data, _ in UNREADABLE.values())]
    config = AnnotateConfig(batch_size=5, workers=workers)
    summary = annotate_shard(make_shard("odd", images), tmp_path / "part.parquet", *models, config, GENERATION, 0)
    rows = pq.read_table(tmp_path / "part.parquet").to_pylist()
    assert (summary.images, summary.candidates) == (len(images), 2 * len(images))
    assert [row["candidate"] for row in rows] == [0, 1] * len(images)
    names = [name for name in (*READABLE, *UNREADABLE) for _ in range(2)]
    web = {name: row for name, row in zip(names, rows, strict=True) if row["candidate"] == 0}
    assert {name: row["reason"] for name, row in web.items()} == {
        **dict.fromkeys(READABLE),
        **{name: reason for name, (_, reason) in UNREADABLE.items()},
    }
    for name, row in zip(names, rows, strict=True):
        assert (row["itm_score"] is None) == (row["itc_score"] is None) == (row["reason"] is not None), name
        assert row["reason"] in {None, "empty_text", *REASONS}


def test_of_an_animation_the_first_frame_is_seen(
    make_shard: Callable[..., Path], tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    still = encoded(PICTURE.quantize(), "GIF")
    shard = make_shard("moving", [animated("GIF"), still, encoded(PICTURE.rotate(180), "GIF")])
    annotate_shard(shard, tmp_path / "part.parquet", *models, AnnotateConfig(workers=0), GENERATION, 0)
    moving, frame, other = pq.read_table(tmp_path / "part.parquet")["itc_score"].to_pylist()[::2]
    assert moving == pytest.approx(frame, abs=1e-5)
    assert abs(moving - other) > 1e-3
