"""DataComp's list of chosen uids: a NumPy array of pairs of uint64, the halves of 128-bit numbers, sorted, each once.

DataComp's resharder maps it into memory, and looks up the number whose hexadecimal digits are a sample's uid.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

NAME = "uids.npy"
UID_TYPE = np.dtype("u8,u8")
# What no such list can hold, as SQL.
NO_UID = "source = 'human' OR NOT regexp_full_match(uid, '[0-9a-fA-F]{1,32}')"


def write_uids(path: Path, count: int, uids: Iterable[list[str]]) -> None:
    """Writes `count` uids of 32 hexadecimal digits, sorted, some at a time."""
    header = {"descr": np.lib.format.dtype_to_descr(UID_TYPE), "fortran_order": False, "shape": (count,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for some in uids:
            halves = np.frombuffer(bytes.fromhex("".join(some)), ">u8")
            file.write(halves.astype("<u8").tobytes())
