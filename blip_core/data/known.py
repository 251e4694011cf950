"""What earlier rounds took in: the URLs and the images of the shards that stood when a round began.

A round is compared with these shards alone and never with its own, which come in any order and may have been made
before a crash: what it takes in follows from its table and from what stood.
"""

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip_core.data.shards import RETRY_PREFIX, read_shard
from blip_core.workspace import Workspace

# Of a sha256; half of it tells any number of images apart, in half of the memory.
DIGEST_BYTES = 16

_reading = threading.Lock()


def find_urls(workspace: Workspace, before: Sequence[str], urls: pa.ChunkedArray) -> tuple[pa.Array, set[str]]:
    """Where these URLs stand already.

    Args:
        before: names of shards; those that are gone are passed over.
        urls: strings; an empty one, or a null, stands nowhere.

    Returns:
        For each URL whether a shard has it, in whatever row and with whatever end; and the names of those shards.

    Raises ShardError where a shard is torn.
    """
    names = _present(workspace, before)
    columns = [_trimmed(read_shard(workspace.shard(name), ["url"])["url"]) for name in names]
    ends = np.cumsum([len(column) for column in columns])
    known = pa.chunked_array(columns, pa.large_string()).combine_chunks()
    places = pc.index_in(_trimmed(urls), value_set=known, skip_nulls=True)
    shards = np.unique(np.searchsorted(ends, pc.drop_null(places).to_numpy(zero_copy_only=False), side="right"))
    return pc.is_valid(places), {names[shard] for shard in shards}


class KnownImages:
    """The images of some shards, by the sha256 of their stored bytes; 16 bytes of memory for each."""

    def __init__(self, digests: np.ndarray) -> None:
        self._digests = digests  # (images,) S16, sorted

    def __contains__(self, sha256: str) -> bool:
        digest = np.bytes_(bytes.fromhex(sha256)[:DIGEST_BYTES])
        place = int(np.searchsorted(self._digests, digest))
        return place < len(self._digests) and self._digests[place] == digest


def known_images(workspace: Workspace, before: Sequence[str]) -> KnownImages:
    """The images of these shards; read once for a process. Shards that are gone are passed over."""
    with _reading:
        return _known_images(workspace, tuple(before))


@lru_cache(maxsize=1)
def _known_images(workspace: Workspace, before: tuple[str, ...]) -> KnownImages:
    columns = (read_shard(workspace.shard(name), ["sha256"])["sha256"] for name in _present(workspace, before))
    digests = [_digests(column) for column in columns]
    return KnownImages(np.sort(np.concatenate([np.empty(0, f"S{DIGEST_BYTES}"), *digests])))


def _digests(column: pa.ChunkedArray) -> np.ndarray:
    values = [bytes.fromhex(value)[:DIGEST_BYTES] for value in column.drop_null().to_pylist()]
    return np.array(values, f"S{DIGEST_BYTES}")


def _present(workspace: Workspace, names: Sequence[str]) -> list[str]:
    """Those of retries first: where a URL stands twice, they have its image."""
    standing = {path.stem for path in workspace.shard_paths()} if names else set()
    return sorted((name for name in names if name in standing), key=lambda name: not name.startswith(RETRY_PREFIX))


def _trimmed(urls: pa.ChunkedArray) -> pa.Array:
    """As they are fetched: without the white space around them; an empty one is null."""
    trimmed = pc.utf8_trim_whitespace(urls.cast(pa.large_string())).combine_chunks()
    return pc.if_else(pc.equal(trimmed, ""), None, trimmed)
