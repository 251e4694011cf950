"""A workspace of made-up candidates, as download and annotation of the web would leave it: for corpus.py.

Everything is drawn for whole shards at once, from the shard's number alone, and written by the writers of the project.
What a question's time depends on is as on the web: domains and words have long tails (Zipf), some pictures are many
times there, some texts are file names or markup, scores lie at both ends. No picture is behind the bytes in a shard.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from blip_core.corpus.schemas import (
    ANNOTATION_SCHEMA,
    ANNOTATION_VERSION,
    CAPTIONER_KEY,
    EMBEDDING_VERSION,
    EMPTY_TEXT,
    FILTER_KEY,
    IMAGES_KEY,
    ROWS_KEY,
    UNSCORED_KEY,
    embedding_schema,
    part_writer,
)
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.files import fingerprint
from blip_core.workspace import Workspace

ROUND = 1
CAPTIONS = 3  # synthetic texts of an image, beside its web text
PER_IMAGE = 1 + CAPTIONS
ROWS_PER_SHARD = 1000  # what `download` does by itself
FAILED = 200  # of them: no image came
IMAGES = ROWS_PER_SHARD - FAILED
WIDTH = 256

DOMAINS, WORDS, PLAIN_WORDS = 200_000, 30_000, 800
PLACEHOLDERS = 500  # pictures that are many times there
EMPTY, FILE_NAMES, MARKUP, PLACED, ALIKE = 0.002, 0.04, 0.02, 0.03, 0.05  # shares
PICTURE = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffd9")  # the head and the end of a JPEG

Random = np.random.Generator
Floats = npt.NDArray[np.float32]


class Plan(NamedTuple):
    """One shard: its number, name, images that arrived, and whether they have embeddings."""

    number: int
    name: str
    images: int
    embedded: bool


def make_workspace(root: Path, rows: int, embedded: int, processes: int) -> list[str]:
    """Writes shards and the annotations of round 1 with `rows` candidates, and embeddings of the first `embedded`
    images, rounded up to whole shards; returns the shards' names."""
    workspace = Workspace.open(root)
    plans = plan_shards(rows, embedded)
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(write_shards, [workspace.root] * processes, [plans[n::processes] for n in range(processes)]))
    return [plan.name for plan in plans]


def plan_shards(rows: int, embedded: int) -> list[Plan]:
    """The shards of so many candidates; only the last one may have fewer images than IMAGES."""
    images = -(-rows // PER_IMAGE)
    starts = range(0, images, IMAGES)
    return [
        Plan(number, fingerprint("candidates", number), min(IMAGES, images - start), start < embedded)
        for number, start in enumerate(starts)
    ]


def write_shards(root: Path, plans: Sequence[Plan]) -> None:
    """Writes the parts of those shards."""
    workspace = Workspace(root)
    made = workspace.round(ROUND)
    for plan in plans:
        draw = np.random.default_rng([2022, plan.number])
        rows = _draw_rows(draw, plan)
        write_shard(workspace.shard(plan.name), [rows], "0", rows.num_rows)
        arrived = rows.filter(pc.equal(rows["status"], "ok"))
        candidates = _draw_candidates(draw, plan, arrived)
        counts = {IMAGES_KEY: plan.images, ROWS_KEY: candidates.num_rows, UNSCORED_KEY: candidates["reason"].length()}
        counts[UNSCORED_KEY] -= candidates["reason"].null_count
        metadata = {key: str(count) for key, count in counts.items()} | {CAPTIONER_KEY: _CAPTIONER, FILTER_KEY: _FILTER}
        target = made.annotations / f"{plan.name}.parquet"
        with part_writer(target, ANNOTATION_SCHEMA, ANNOTATION_VERSION, plan.name, metadata) as writer:
            writer.write(candidates)
        if plan.embedded:
            _write_embeddings(draw, made.embeddings / f"{plan.name}.parquet", arrived["uid"])


def _draw_rows(draw: Random, plan: Plan) -> pa.Table:
    """The rows of a shard, sorted by uid; those that failed lie anywhere among them."""
    count = plan.images + FAILED * plan.images // IMAGES
    uid = _hex(np.sort(draw.integers(0, 2**63, count, np.uint64)), 1)
    arrived = np.zeros(count, bool)
    arrived[draw.permutation(count)[: plan.images]] = True
    there = pa.array(arrived)
    domain = _domains().take(pa.array(_zipf(draw, DOMAINS, 1.1, count)))
    sizes = draw.integers(200, 1200, (4, count), np.int32)
    reasons = pa.array(["not_found", "dns", "timeout", "too_small"]).take(pa.array(draw.integers(0, 4, count)))
    columns = {
        "uid": uid,
        "url": pc.binary_join_element_wise(pa.scalar("https://"), domain, pa.scalar("/images/"), uid, ".jpg", ""),
        "caption": _web_texts(draw, count),
        "status": pc.if_else(there, "ok", "failed"),
        "reason": pc.if_else(there, pa.scalar(None, pa.string()), reasons),
        **{
            name: pc.if_else(there, pa.array(size), pa.scalar(None, pa.int32()))
            for name, size in zip(("width", "height", "original_width", "original_height"), sizes, strict=True)
        },
        "sha256": pc.if_else(there, _identities(draw, count), pa.scalar(None, pa.string())),
        "image": pc.if_else(there, pa.scalar(PICTURE), pa.scalar(None, pa.binary())),
    }
    return pa.table(columns, SHARD_SCHEMA)


def _draw_candidates(draw: Random, plan: Plan, images: pa.Table) -> pa.Table:
    """The web text and the captions of every image, in the order of a part."""
    count = len(images) * PER_IMAGE
    image = pa.array(np.repeat(np.arange(len(images)), PER_IMAGE))
    place = np.tile(np.arange(PER_IMAGE, dtype=np.int8), len(images))
    sampled = pa.array(place > 0)
    captions = _captions(draw, count)
    text = pc.if_else(sampled, captions, images["caption"].combine_chunks().take(image))
    text = pc.if_else(pa.array(draw.random(count) < EMPTY), "", text)
    scored = pc.not_equal(text, "")
    itm, itc = _scores(draw, place > 0)
    none = {kind: pa.scalar(None, kind) for kind in (pa.string(), pa.float32(), pa.int64())}
    seeds = pa.array(draw.integers(0, 2**63, count, np.int64))
    columns = {
        "uid": images["uid"].combine_chunks().take(image),
        "shard": _constant(plan.name, count),
        "url": images["url"].combine_chunks().take(image),
        "image_sha256": images["sha256"].combine_chunks().take(image),
        "text": text,
        "source": pc.if_else(sampled, "synthetic", "web"),
        "candidate": pa.array(place),
        "itm_score": pc.if_else(scored, pa.array(itm), none[pa.float32()]),
        "itc_score": pc.if_else(scored, pa.array(itc), none[pa.float32()]),
        "logprob": pc.if_else(sampled, pa.array(draw.normal(-1.2, 0.3, count).astype(np.float32)), none[pa.float32()]),
        "captioner": pc.if_else(sampled, _CAPTIONER, none[pa.string()]),
        "filter": _constant(_FILTER, count),
        "seed": pc.if_else(sampled, seeds, none[pa.int64()]),
        "reason": pc.if_else(scored, none[pa.string()], EMPTY_TEXT),
    }
    return pa.table(columns, ANNOTATION_SCHEMA)


def _scores(draw: Random, synthetic: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """itm_score, at both ends, and an itc_score that goes with it; more captions fit than web texts."""
    fits = draw.random(len(synthetic)) < np.where(synthetic, 0.75, 0.55)
    itm = np.where(fits, draw.beta(5, 0.6, len(synthetic)), draw.beta(0.5, 4, len(synthetic))).astype(np.float32)
    itc = (0.1 + 0.3 * itm + draw.normal(0, 0.05, len(itm))).astype(np.float32)
    return itm, np.clip(itc, -1, 1)


def _write_embeddings(draw: Random, target: Path, uids: pa.ChunkedArray) -> None:
    """Of length 1; one in twenty lies close to another image's."""
    vectors = draw.standard_normal((len(uids), WIDTH), np.float32)
    alike = np.flatnonzero(draw.random(len(uids)) < ALIKE)
    noise = draw.standard_normal((len(alike), WIDTH), np.float32)
    vectors[alike] = vectors[draw.integers(0, len(uids), len(alike))] + 0.15 * noise
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), WIDTH)
    schema = embedding_schema(WIDTH)
    with part_writer(target, schema, EMBEDDING_VERSION, "0") as writer:
        writer.write(pa.table([uids.combine_chunks(), values], schema))


def _web_texts(draw: Random, count: int) -> pa.Array:
    """Alternative texts: three to twenty words, some of them markup, and some no words but a file's name."""
    texts = _sentences(draw, _vocabulary(WORDS), draw.integers(3, 21, count))
    kind = draw.random(count)
    numbers = pa.array(draw.integers(1000, 10_000, count)).cast(pa.string())
    names = pc.binary_join_element_wise("IMG_", numbers, ".jpg", "")
    marked = pc.binary_join_element_wise("<b>", texts, "</b>", "")
    texts = pc.if_else(pa.array(kind < FILE_NAMES), names, texts)
    return pc.if_else(pa.array(kind > 1 - MARKUP), marked, texts)


def _captions(draw: Random, count: int) -> pa.Array:
    """Short sentences of plain words, as a Captioner's are."""
    return _sentences(draw, _vocabulary(PLAIN_WORDS), draw.integers(5, 13, count))


def _sentences(draw: Random, words: pa.Array, lengths: npt.NDArray[np.int64]) -> pa.Array:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    drawn = words.take(pa.array(_zipf(draw, len(words), 1.05, int(ends[-1]))))
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(ends), drawn), " ")


def _identities(draw: Random, count: int) -> pa.Array:
    """A sha256 for each picture; some are those of the same few."""
    digits = draw.integers(0, 2**63, (count, 4), np.uint64)
    placed = draw.random(count) < PLACED
    digits[placed] = _zipf(draw, PLACEHOLDERS, 1.0, int(placed.sum()))[:, None].astype(np.uint64)
    return _hex(digits, 4)


def _hex(numbers: npt.NDArray[np.uint64], each: int) -> pa.Array:
    """Hexadecimal digits, 16 for each number; `each` numbers make one string."""
    digits = numbers.astype(">u8").tobytes().hex().encode()
    count = numbers.size // each
    offsets = np.arange(count + 1, dtype=np.int32) * 16 * each
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(digits))


def _zipf(draw: Random, size: int, power: float, count: int) -> npt.NDArray[np.int64]:
    """Numbers below `size`, each with a probability that falls with its rank."""
    return np.searchsorted(_zipf_sums(size, power), draw.random(count)).astype(np.int64)


@lru_cache
def _zipf_sums(size: int, power: float) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -power)
    return shares[:-1] / shares[-1]


@lru_cache
def _domains() -> pa.Array:
    kinds = ("www.shop{}.com", "img{}.example.co.uk", "cdn.photos{}.net", "blog{}.org")
    return pa.array([kinds[number % len(kinds)].format(number) for number in range(DOMAINS)])


@lru_cache
def _vocabulary(size: int) -> pa.Array:
    """So many different made-up words, the frequent ones short."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    base = len(syllables)
    words = []
    for number in range(size):
        word, rest = syllables[number % base], number // base
        while rest:
            word, rest = word + syllables[rest % base], rest // base
        words.append(word)
    return pa.array(words)


def _constant(text: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(text), count)


_CAPTIONER, _FILTER = fingerprint("a captioner"), fingerprint("a filter")
