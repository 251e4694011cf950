"""What earlier rounds took in: the URLs and the images of the shards that stood when a round began.

A round is compared with these shards alone and never with its own, which come in any order and may have been made
before a crash: what it takes in follows from its table and from what stood.
"""

import hashlib
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip_core.data.shards import read_shard
from blip_core.workspace import Workspace

# So many tell any number of images, URLs or uids apart; of a sha256 they are the half.
DIGEST_BYTES = 16

_reading = threading.Lock()


class KnownTexts:
    """The texts of some shards, and the shards that have each; 20 bytes of memory for each, twice while built."""

    def __init__(self, names: Sequence[str], columns: Iterable[pa.ChunkedArray]) -> None:
        """Takes a column of texts for each name; nulls are no texts."""
        self._names = list(names)
        by_shard = [_text_digests(column.drop_null()) for column in columns]
        shards = np.repeat(np.arange(len(by_shard), dtype=np.int32), [len(digests) for digests in by_shard])
        digests = np.concatenate([np.empty(0, f"S{DIGEST_BYTES}"), *by_shard])
        by_shard.clear()
        order = np.argsort(digests, kind="stable")
        self._digests, self._shards = digests[order], shards[order]  # (texts,) S16, sorted; (texts,) int32

    def find(self, texts: pa.ChunkedArray) -> tuple[pa.Array, set[str]]:
        """For each text whether a shard has it, a null in none; and the names of all shards that have one of them."""
        given = pc.is_valid(texts).to_numpy()
        found = np.zeros(len(texts), bool)
        digests = _text_digests(texts.drop_null())
        places = np.searchsorted(self._digests, digests)
        inside = places < len(self._digests)
        inside[inside] = self._digests[places[inside]] == digests[inside]
        found[given] = inside
        return pa.array(found), self._owners(places[inside])

    def _owners(self, places: np.ndarray) -> set[str]:
        """The shards of the texts at these places, and of the same texts behind them."""
        firsts = np.unique(places)
        counts = np.searchsorted(self._digests, self._digests[firsts], side="right") - firsts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return {self._names[shard] for shard in np.unique(self._shards[np.repeat(firsts, counts) + within])}


def known_urls(workspace: Workspace, before: Sequence[str]) -> KnownTexts:
    """The URLs of these shards, in whatever row and with whatever end; shards that are gone are passed over.

    They are to be asked for with `trimmed`. Raises ShardError where a shard is torn.
    """
    names = _present(workspace, before)
    return KnownTexts(names, (trimmed(read_shard(workspace.shard(name), ["url"])["url"]) for name in names))


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
    standing = {path.stem for path in workspace.shard_paths()} if names else set()
    return [name for name in names if name in standing]


def trimmed(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """As they are fetched: without the white space around them; an empty one is null."""
    stripped = pc.utf8_trim_whitespace(urls)
    return pc.if_else(pc.equal(stripped, ""), None, stripped)


def _text_digests(texts: pa.ChunkedArray) -> np.ndarray:
    digests = (hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in texts.to_pylist())
    return np.fromiter(digests, f"S{DIGEST_BYTES}", count=len(texts))
