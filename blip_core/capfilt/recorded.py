"""What a round has on record of one image: its texts and scores, and all that decided them, as a part's metadata say.

A part of an earlier version does not say how its captions were decoded; the default settings stand in, and `told` is
false.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.corpus.schemas import (
    ANNOTATION_SCHEMA,
    ANNOTATION_VERSION,
    CAPTIONER_KEY,
    FILTER_KEY,
    GENERATION_KEY,
    PRECISION_KEY,
)
from blip_core.data.shards import SHARD_VERSION, check_part
from blip_core.errors import InputError, ShardError
from blip_core.med.decoding import GenerationConfig
from blip_core.med.inference import Precision
from blip_core.workspace import Workspace

Row = dict[str, Any]


@dataclass(frozen=True)
class Recorded:
    """One image in one annotation part.

    Attributes:
        image: the bytes that the shard has, and `caption` its web text.
        rows: of ANNOTATION_SCHEMA, in the order of `candidate`.
        captioner, filter: the models' digests.
        told: whether the part says how its captions were decoded.
    """

    round: int
    shard: str
    image: bytes
    caption: str
    rows: tuple[Row, ...]
    captioner: str
    filter: str
    precision: Precision
    generation: GenerationConfig
    told: bool


def read_recorded(workspace: Workspace, round: int, shard: str, uid: str) -> Recorded:
    """What a round has of an image of a shard.

    Raises ShardError where the part or the shard is missing or torn, names several models, or its metadata are no
    settings; InputError where one of the two has not the image any more.
    """
    part = workspace.round(round).annotations / f"{shard}.parquet"
    said = check_part(part, ANNOTATION_VERSION)
    rows = _rows(part, uid, ANNOTATION_SCHEMA.names)
    check_part(workspace.shard(shard), SHARD_VERSION)
    images = [row for row in _rows(workspace.shard(shard), uid, ["uid", "caption", "image"]) if row["image"]]
    for path, found in ((part, rows), (workspace.shard(shard), images)):
        if not found:
            raise InputError(f"{path}: has no image {uid!r} (any more); there is nothing to compute again")
    return Recorded(
        round=round,
        shard=shard,
        image=images[0]["image"],
        caption=images[0]["caption"] or "",
        rows=tuple(sorted(rows, key=lambda row: row["candidate"])),
        captioner=_digest(part, "captioner", rows, said.get(CAPTIONER_KEY)),
        filter=_digest(part, "filter", rows, said.get(FILTER_KEY)),
        precision=_precision(part, said.get(PRECISION_KEY, "fp32")),
        generation=_generation(part, said.get(GENERATION_KEY, "{}")),
        told=GENERATION_KEY in said,
    )


def _rows(path: Path, uid: str, columns: list[str]) -> list[Row]:
    """The rows of an image in a part, from the row groups that may hold them."""
    try:
        return pq.read_table(stores.readable(path), columns=columns, filters=[("uid", "=", uid)]).to_pylist()
    except stores.errors(pa.ArrowException) as error:
        raise ShardError(f"{path}: is torn or lacks a column ({error}). Delete it and run the step again") from error


def _digest(part: Path, kind: str, rows: list[Row], said: str | None) -> str:
    """The digest that all rows of the image have, and the part's metadata where it names one."""
    found = {row[kind] for row in rows} | ({said} if said else set())
    if len(found) > 1 or None in found:
        listed = ", ".join(sorted(map(str, found)))
        raise ShardError(f"{part}: rows and metadata name several {kind}s ({listed}); a part is the work of one")
    return str(found.pop())


def _precision(part: Path, name: str) -> Precision:
    if name not in get_args(Precision):
        raise ShardError(f"{part}: {PRECISION_KEY} is {name!r}; expected one of {', '.join(get_args(Precision))}")
    return cast("Precision", name)


def _generation(part: Path, text: str) -> GenerationConfig:
    try:
        return GenerationConfig(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ShardError(f"{part}: {GENERATION_KEY} is {text!r:.80}, no settings of decoding ({error})") from error
