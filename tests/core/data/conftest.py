"""Files of numbered pictures with numbered texts."""

import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.data.pairs import PairSource

WritePairs = Callable[..., PairSource]
KillProgram = Callable[[Path], tuple[list[int], list[int]]]


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


@pytest.fixture
def kill_program() -> KillProgram:
    """Starts a program that prints the numbers of its children, and kills it: children before, and a minute after."""

    def kill(script: Path) -> tuple[list[int], list[int]]:
        # Python's resource tracker says on stderr that a killed process left semaphores, and takes them away
        with subprocess.Popen(
            [sys.executable, str(script)], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as program:
            assert program.stdout is not None
            children = [int(number) for number in program.stdout.readline().split()]
            before = list(filter(_lives, children))
            program.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (after := list(filter(_lives, children))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return before, after

    return kill


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"  # one that nobody has waited for yet
