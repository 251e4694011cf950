"""Publishing: a SQL predicate over annotations decides which candidates the corpus keeps (BLIP, section 3.3).

The default is the paper's rule, "the Filter's argmax says match"; other rules come on top of it, each off by default
(blip_core/corpus/rules.py). pyarrow writes the part, so that the same inputs give the same bytes.
"""

import hashlib
import io
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from blip_core import stores
from blip_core.corpus.removal import annotation_digest, denied_rows
from blip_core.corpus.rules import ANY_IMAGE, ANY_TEXT, REJECTIONS, ImageRules, PublishConfig, TextRules
from blip_core.corpus.schemas import (
    ANNOTATION_SCHEMA,
    ANNOTATION_VERSION,
    CORPUS_SCHEMA,
    CORPUS_VERSION,
    FINGERPRINT_KEY,
    ROW_GROUP_ROWS,
    write_part,
)
from blip_core.corpus.verdicts import LEFT_OUT_SCHEMA, PREDICATE_SCHEMA, check_predicate, judge
from blip_core.data.denied import NOTHING, Denied
from blip_core.data.images import MALFORMED, ORIENTATION_TAG
from blip_core.data.shards import check_part, read_shard
from blip_core.data.tables import PairTable, iterate_pairs
from blip_core.errors import InputError, ShardError
from blip_core.files import fingerprint
from blip_core.texts import candidate_text

WHERE_KEY = "capfilt.where"
BEST_OF_KEY = "capfilt.best_of"
KEPT_KEY = "capfilt.kept"
REJECTED_KEY = "capfilt.rejected"
# Rejected candidates by reason, and the rules but for predicate and best_of; both are JSON.
REJECTIONS_KEY = "capfilt.rejections"
RULES_KEY = "capfilt.rules"
# A digest of the images that were left out when the round's images were compared.
LEFT_OUT_KEY = "capfilt.left_out"

UNUSABLE = "unusable"  # of a human pair: no word in it, or an image that cannot be opened
MOST_CAPTIONS = 128  # of one image; `candidate` is an int8
TURNED = (5, 6, 7, 8)  # the EXIF orientations that swap width and height


@dataclass(frozen=True)
class PublishSummary:
    """What publishing one part kept. `by_source` counts the kept rows, `by_reason` the rejected ones."""

    shard: str
    kept: int
    rejected: int
    by_source: dict[str, int]
    skipped: bool
    by_reason: dict[str, int] = field(default_factory=dict)


def publish_shard(
    annotation: Path,
    shard: Path,
    target: Path,
    where: str,
    round: int,
    best_of: bool = False,
    text: TextRules = ANY_TEXT,
    images: ImageRules = ANY_IMAGE,
    left_out: pa.Table | None = None,
    denied: Denied = NOTHING,
) -> PublishSummary:
    """Writes the corpus part of one shard: the rows of `annotation` for which `where` is true and all rules hold.

    A candidate without scores never passes. With `best_of` the best synthetic text of an image alone does, by
    itm_score, of equal ones the first. What is `denied` is no candidate, and no part that has it stands. Does nothing
    where `target` stands with the same rules, round, annotations and images left out.

    Args:
        left_out: the images of the shard that lost against others (LEFT_OUT_SCHEMA); None where none were compared.

    Raises ConfigError for the predicate, QueryError where it fails on a row, and ShardError where a part is torn or
    the shard lacks an annotated image.
    """
    config = PublishConfig(where, best_of, text, images)
    check_predicate(where)
    check_part(annotation, ANNOTATION_VERSION)
    lost = digest_of(left_out)
    mark = fingerprint(CORPUS_VERSION, asdict(config), round, annotation_digest(annotation), lost)
    if standing_fingerprint(target, denied) == mark:
        return read_summary(target, skipped=True)
    candidates = read_candidates(annotation, shard, denied)
    reasons = judge(candidates, config, left_out, annotation)
    kept, rejections = candidates.filter(pc.is_null(reasons)), count_reasons(reasons)
    if kept.num_rows + sum(rejections.values()) != candidates.num_rows:
        raise ShardError(f"{target}: {kept.num_rows} kept, {rejections} rejected of {candidates.num_rows} candidates")
    columns = {name: kept[name] for name in CORPUS_SCHEMA.names if name != "round"}
    columns["round"] = pa.array([round] * kept.num_rows, pa.int32())
    metadata = {**_rules(config, lost), **counts_of(kept.num_rows, rejections)}
    write_part(target, pa.table(columns, schema=CORPUS_SCHEMA), CORPUS_VERSION, mark, metadata)
    return read_summary(target, skipped=False)


def read_rules(metadata: dict[str, str]) -> PublishConfig | None:
    """The rules that a corpus part was published with, from its metadata; None for that of the human pairs."""
    if WHERE_KEY not in metadata:
        return None
    rules = json.loads(metadata.get(RULES_KEY, "{}"))
    text = rules.get("text", {})
    text |= {"languages": tuple(text["languages"])} if text.get("languages") is not None else {}
    best_of = metadata[BEST_OF_KEY] == "true"
    return PublishConfig(metadata[WHERE_KEY], best_of, TextRules(**text), ImageRules(**rules.get("images", {})))


def published_rules(corpus: Path) -> PublishConfig | None:
    """The rules of the corpus that stands in a folder, as its first part has them; None where nothing is published.

    Raises ShardError where a part is torn.
    """
    said = (read_rules(check_part(part, CORPUS_VERSION)) for part in sorted(corpus.glob("*.parquet")))
    return next((rules for rules in said if rules is not None), None)


def publish_human(human: PairTable, folder: Path, round: int, denied: Denied = NOTHING) -> PublishSummary:
    """Writes the human pairs as the corpus part `human-<fingerprint>.parquet`; they are not judged (BLIP, 3.3).

    Rejected is a caption without a word or too long for one, or whose image cannot be opened; a denied image is left
    out. A part of other human pairs in `folder` is removed, so that a changed table never doubles them.
    """
    rows, rejected, digest = _human_rows(human, round, denied)
    mark = fingerprint(CORPUS_VERSION, round, digest)
    target = folder / f"human-{mark}.parquet"
    skipped = standing_fingerprint(target, denied) == mark
    if not skipped:
        write_part(
            target, rows, CORPUS_VERSION, mark, counts_of(rows.num_rows, {UNUSABLE: rejected} if rejected else {})
        )
    for other in set(folder.glob("human-*.parquet")) - {target}:
        other.unlink()
    return read_summary(target, skipped)


def _human_rows(human: PairTable, round: int, denied: Denied) -> tuple[pa.Table, int, str]:
    """The human pairs as rows of the corpus, how many captions were rejected, and a digest of all of them."""
    batches: list[pa.Table] = []
    rows: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    digest = hashlib.sha256()
    for uid, image, captions in iterate_pairs(human):
        size = _image_size(image)
        identity = hashlib.sha256(image).hexdigest()
        for text in captions:
            digest.update(f"{uid}\0{identity}\0{text}\n".encode())
            if identity in denied.images:
                continue
            shown = candidate_text(text)
            if size is not None and shown.text.strip() and not shown.too_long:
                width, height = size
                shared = {"source": "human", "width": width, "height": height, "round": round}
                row = {"uid": uid, "image_sha256": identity, "text": shown.text, "candidate": seen[uid]}
                rows.append(row | shared)
            seen[uid] += 1
        if seen[uid] > MOST_CAPTIONS:
            raise InputError(f"{human.path}: image {uid} has more than {MOST_CAPTIONS} captions; is it a placeholder?")
        if len(rows) >= ROW_GROUP_ROWS:
            batches.append(pa.Table.from_pylist(rows, schema=CORPUS_SCHEMA))
            rows = []
    table = pa.concat_tables([*batches, pa.Table.from_pylist(rows, schema=CORPUS_SCHEMA)])
    return table, seen.total() - table.num_rows, digest.hexdigest()


def counts_of(kept: int, rejections: dict[str, int] | None = None) -> dict[str, str]:
    """The metadata of a corpus part with those counts; without what is rejected where that is not known anew."""
    counts = {KEPT_KEY: str(kept)}
    if rejections is not None:
        counts |= {REJECTED_KEY: str(sum(rejections.values())), REJECTIONS_KEY: json.dumps(rejections)}
    return counts


def _rules(config: PublishConfig, lost: str | None) -> dict[str, str]:
    others = json.dumps({"text": asdict(config.text), "images": asdict(config.images)})
    metadata = {WHERE_KEY: config.where, BEST_OF_KEY: json.dumps(config.best_of), RULES_KEY: others}
    return metadata if lost is None else metadata | {LEFT_OUT_KEY: lost}


def count_reasons(reasons: pa.Array) -> dict[str, int]:
    """How many candidates each rule rejected, in the order of the rules; those that rejected none are not named."""
    found = {count["values"]: count["counts"] for count in pc.value_counts(reasons.drop_null()).to_pylist()}
    return {reason: found[reason] for reason in REJECTIONS if reason in found}


def digest_of(left_out: pa.Table | None) -> str | None:
    """Changes when the images that were left out do; None where none were compared."""
    return None if left_out is None else fingerprint(left_out.select(LEFT_OUT_SCHEMA.names).to_pydict())


def _image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height as shown (after EXIF orientation), from the header alone; None where it is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ORIENTATION_TAG, 1) in TURNED
            return (image.height, image.width) if turned else image.size
    except (OSError, Image.DecompressionBombError, Image.DecompressionBombWarning, *MALFORMED):
        return None


def standing_fingerprint(target: Path, denied: Denied = NOTHING) -> str | None:
    """The fingerprint of the corpus part under that name; None where there is none, it is torn or has denied rows."""
    if not target.exists():
        return None
    try:
        found = check_part(target, CORPUS_VERSION)[FINGERPRINT_KEY]
        return None if denied and any(denied_rows(target, denied)) else found
    except ShardError:
        return None  # written anew


def read_rejections(part: Path) -> Counter[str]:
    """How many candidates a corpus part rejected, by reason. Raises ShardError where it is torn."""
    return Counter(json.loads(check_part(part, CORPUS_VERSION).get(REJECTIONS_KEY, "{}")))


def read_summary(target: Path, skipped: bool) -> PublishSummary:
    """The summary of a corpus part, read back from the part itself."""
    metadata = check_part(target, CORPUS_VERSION)
    counts = pq.read_table(stores.readable(target), columns=["source"])["source"].value_counts().to_pylist()
    by_source = {count["values"]: count["counts"] for count in sorted(counts, key=lambda count: count["values"])}
    rejected, by_reason = int(metadata[REJECTED_KEY]), json.loads(metadata.get(REJECTIONS_KEY, "{}"))
    return PublishSummary(target.stem, sum(by_source.values()), rejected, by_source, skipped, by_reason)


def read_candidates(annotation: Path, shard: Path, denied: Denied = NOTHING) -> pa.Table:
    """The annotations with width and height of their images (PREDICATE_SCHEMA), in the order of the part.

    What is `denied` is left out. Raises ShardError where the shard lacks an annotated image.
    """
    rows = pq.read_table(stores.readable(annotation), schema=ANNOTATION_SCHEMA)
    if denied:
        rows = rows.filter(pc.invert(pa.array(denied_rows(rows, denied), pa.bool_())))
    sizes = read_shard(shard, columns=["uid", "width", "height"])
    index = pc.index_in(rows["uid"], value_set=sizes["uid"].combine_chunks())
    if index.null_count:
        missing = rows["uid"].filter(pc.is_null(index))[0].as_py()
        raise ShardError(f"{annotation}: uid {missing!r} is not in {shard}; annotate the shard again")
    columns = [*rows.columns, sizes["width"].take(index), sizes["height"].take(index)]
    return pa.table(columns, schema=PREDICATE_SCHEMA)
