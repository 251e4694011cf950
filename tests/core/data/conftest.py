"""Files of numbered pictures with numbered texts."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.data.pairs import PairSource

WritePairs = Callable[..., PairSource]


def png(number: int) -> bytes:
    """A picture that no other number has, and on which a crop, a mirror and a rotation show."""
    down = Image.linear_gradient("L").resize((12, 10))
    plain = Image.new("L", down.size, number)
    buffer = io.BytesIO()
    Image.merge("RGB", [plain, down, down.rotate(90)]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def write_pairs(tmp_path: Path) -> WritePairs:
    """Writes human pairs: picture n with the text 'n', in row groups; those in `broken` have no whole image."""

    def write(name: str, numbers: Iterable[int], row_group_size: int = 3, broken: Iterable[int] = ()) -> PairSource:
        spoilt = dict.fromkeys(broken, b"<html>not an image</html>")
        rows = [{"image": spoilt.get(number, png(number)), "caption": str(number)} for number in numbers]
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
        return PairSource(path)

    return write
