"""A dozen coloured pictures with captions, and settings of a training that takes a second."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from blip_core.data.pairs import PairSource
from blip_core.med.architecture import MEDConfig
from blip_core.med.word_pieces import TokenizerConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
SHAPES = ("circle", "square", "bar")


def draw(colour: str, shape: str) -> bytes:
    picture = Image.new("RGB", (20, 20), (20, 20, 20))
    pencil = ImageDraw.Draw(picture)
    if shape == "circle":
        pencil.ellipse((3, 3, 16, 16), fill=COLOURS[colour])
    elif shape == "square":
        pencil.rectangle((3, 3, 16, 16), fill=COLOURS[colour])
    else:
        pencil.rectangle((0, 8, 19, 12), fill=COLOURS[colour])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[PairSource]:
    path = tmp_path_factory.mktemp("pairs") / "human.parquet"
    rows = [
        {"image": draw(colour, shape), "caption": [f"a {colour} {shape}", f"one {shape} that is {colour}"]}
        for colour in COLOURS
        for shape in SHAPES
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    return [PairSource(path)]


@pytest.fixture(scope="session")
def sizes() -> MEDConfig:
    """Dropout and stochastic depth are on, so that a wrong random state would show."""
    return MEDConfig(
        "tiny",
        image_size=16,
        patch_size=8,
        image_width=32,
        image_depth=2,
        image_heads=2,
        text_width=32,
        text_depth=1,
        text_heads=2,
        projection=8,
        drop_path=0.1,
        dropout=0.1,
    )


@pytest.fixture(scope="session")
def words() -> TokenizerConfig:
    return TokenizerConfig("train", vocabulary=100, max_tokens=12)
