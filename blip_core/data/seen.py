"""What a training sees: the names and the contents of its shards, corpus parts and human pairs.

The checkpoint keeps it in `data.json`, so that an image leads to the models that were trained on it, and a model to
its images. It holds no path and no time of day: the same data give the same bytes.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from blip_core.data.pairs import PairSource, pair_identities

SEEN_VERSION = "data/1"
DIGITS = 16


class Seen(NamedTuple):
    """`digest` identifies all pairs, as `pairs_digest` does; `record` is what data.json holds, JSON-like."""

    digest: str
    record: dict[str, Any]


def see(sources: Sequence[PairSource], round: int | None) -> Seen:
    """Reads the texts and the images' identities of the sources once, in order.

    The record has schema, round, digest, and sources [{"kind": "shard", "corpus" or "human", "name", "digest" (of its
    pairs), "images" (with a text)}]; the name is a shard's, or a human table's file. Raises as `pairs_digest` does.
    """
    total, seen = hashlib.sha256(), []
    for source in sources:
        own, images = hashlib.sha256(), 0
        for identity in pair_identities(source):
            total.update(identity)
            own.update(identity)
            images += 1
        digest = own.hexdigest()[:DIGITS]
        seen.append({"kind": kind_of(source), "name": name_of(source), "digest": digest, "images": images})
    digest = total.hexdigest()[:DIGITS]
    return Seen(digest, {"schema": SEEN_VERSION, "round": round, "digest": digest, "sources": seen})


def kind_of(source: PairSource) -> str:
    """What a source is called in a record."""
    return "human" if source.human else "shard" if source.texts is None else "corpus"


def name_of(source: PairSource) -> str:
    """A shard's name; a human table's with its suffix."""
    return source.path.name if source.human else source.path.stem
