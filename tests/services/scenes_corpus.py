"""The corpus that docs/sql.md asks: two rounds over the scenes' web, the same on every machine.

Pictures, web texts, human pairs and their truth are the generator's, and every file is written by the pipeline's own
functions. Nothing is fetched and nothing trained: see scenes_judges.py for the texts and scores, and scenes_models.py
for the checkpoints. Times and curves are made up.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip_core.capfilt.embeddings import embedding_mark, embedding_table
from blip_core.corpus.catalog import build_catalog
from blip_core.corpus.rounds import begin_round, promote
from blip_core.corpus.schemas import (
    ANNOTATION_SCHEMA,
    ANNOTATION_VERSION,
    EMBEDDING_VERSION,
    FILTER_KEY,
    IMAGES_KEY,
    part_writer,
    write_part,
)
from blip_core.corpus.selection import publish_human, publish_shard
from blip_core.data.denied import NOTHING
from blip_core.data.download import DownloadConfig, plan_shards, read_plan, row_groups, settings_hash, web_urls
from blip_core.data.fetch import Fetched
from blip_core.data.known import known_images
from blip_core.data.pairs import PairSource
from blip_core.data.seen import see
from blip_core.data.shards import read_shard, write_shard
from blip_core.data.tables import PairTable, WebTable
from blip_core.evaluation.answers import ANSWERS_VERSION, RIGHT, WRONG, audit_answers
from blip_core.evaluation.audit import audit
from blip_core.evaluation.sample import draw_sample
from blip_core.files import write_json
from blip_core.med.text_embedder import TextEmbedder
from blip_core.scenes.web import ScenesConfig, ScenesPaths, make_scenes
from blip_core.training.metrics import Measured, MetricsLog
from blip_core.workspace import Round, Workspace
from services.scenes_judges import HOST, Judges, Row, Truth, annotate_image, chance, embed_images, read_truth
from services.scenes_models import WIDTH, save_counting_med

SCENES = ScenesConfig(
    web_images=240, human_pairs=40, held_out=1, dead_links=12, non_images=5, truncated=4, oversized=1, duplicates=10
)
DOWNLOAD = DownloadConfig(rows_per_shard=60, image_size=64, processes=1)
HOSTS = ("photos.example", "blog.example", "stock.example", "shop.example", "cdn.example")
USUAL = {"right": (50, 20, 15, 5, 10), "mismatched": (15, 20, 25, 10, 30), "junk": (5, 10, 20, 45, 20)}
"""How many of a hundred texts of a kind stand at each host."""
KNOWN_AT_FIRST = 170
"""Rows of the URL table of the first round; the second one has all."""
JUDGES = {1: (450, 120, 1), 2: (300, 40, 3)}
"""Of each round: `mistold`, `misjudged` and `candidates` of its Judges."""
SECONDS = {
    1: {"download": 31.5, "pretrain": 412.0, "finetune_captioner": 96.0, "finetune_filter": 120.0, "annotate": 66.0},
    2: {"download": 18.25, "pretrain": 430.0, "finetune_captioner": 97.5, "finetune_filter": 121.0, "annotate": 140.0},
}
TRAININGS = {"med": (300, ("itc", "itm", "lm")), "captioner": (100, ("lm",)), "filter": (100, ("itc", "itm"))}
"""Steps and objectives of each training."""
FALLS = {"itc": (1.75, 2.5), "itm": (0.25, 0.5), "lm": (0.75, 4.0)}
"""Where each loss ends, and how far above it begins."""
MARKED = 120
"""Pairs that the audit's person looks at."""
NOTED = 6
"""Images in the table of the user's own, mine.csv."""


def make_corpus(root: Path, shake: float = 0.0) -> Workspace:
    """Builds the workspace at `root`: two rounds, the second one promoted.

    Args:
        shake: moves every number of the images' embeddings by up to so much, as other hardware might.
    """
    workspace = Workspace.open(root)
    scenes = make_scenes(root / "scenes", SCENES)
    truth = read_truth(scenes.truth)
    rows = pq.read_table(scenes.rows).sort_by("uid")
    urls = _urls(rows, truth)
    for number in JUDGES:
        before = begin_round(workspace, number).shards if number > 1 else []
        _download(workspace, scenes, rows.slice(0, KNOWN_AT_FIRST if number == 1 else None), urls, before)
        judges = _make_models(workspace, workspace.round(number), scenes)
        shards = {path: _images(path) for path in workspace.shard_paths()}
        firsts = {row["sha256"]: row["uid"] for rows in shards.values() for row in rows}
        for shard, images in shards.items():
            vectors = embed_images(images, firsts, truth, judges, shake)
            _write_embeddings(workspace.round(number), shard, images, vectors, judges)
            _annotate(workspace.round(number), shard, images, vectors, truth, judges)
        _finish(workspace, number, scenes)
    _mark_sample(workspace, truth)
    mine = [f"{uid},note {number}" for number, uid in enumerate(rows["uid"].to_pylist()[: 8 * NOTED : 8], start=1)]
    (root / "mine.csv").write_text("\n".join(["uid,note", *mine, ""]), encoding="utf-8")
    promote(workspace, max(JUDGES))
    build_catalog(workspace)
    return workspace


def _urls(rows: pa.Table, truth: Mapping[str, Truth]) -> dict[str, str]:
    """The URL of each picture by its path: junk stands at shops more often than at collections of photographs."""
    urls: dict[str, str] = {}
    for uid, path in zip(rows["uid"].to_pylist(), rows["path"].to_pylist(), strict=True):
        shares = np.cumsum(USUAL[truth[uid].kind])
        host = HOSTS[int(np.searchsorted(shares, chance(uid, HOST).integers(100), side="right"))]
        urls.setdefault(path, f"https://{host}/{path}")
    return urls


def _download(
    workspace: Workspace, scenes: ScenesPaths, rows: pa.Table, urls: Mapping[str, str], before: list[str]
) -> None:
    """Shards as a download leaves them, of the files that the generator drew."""
    files = {url: scenes.folder / path for path, url in urls.items()}
    web = WebTable(str(workspace.root / "urls.parquet"), caption="alt")
    columns = {"uid": rows["uid"], "url": [urls[path] for path in rows["path"].to_pylist()], "alt": rows["alt"]}
    pq.write_table(pa.table(columns), web.path)
    for name in plan_shards(web, DOWNLOAD, workspace, before).names:
        plan = workspace.plans / f"{name}.parquet"
        asked = read_plan(plan, name, DOWNLOAD)
        found = {url: files[url] for url in web_urls(asked)}
        answers = {url: Fetched(file) if file.exists() else Fetched(None, "not_found") for url, file in found.items()}
        groups = row_groups(asked, answers, DOWNLOAD, known_images(workspace, before), NOTHING)
        write_shard(workspace.shard(name), groups, settings_hash(DOWNLOAD), asked.num_rows)
        plan.unlink()


def _make_models(workspace: Workspace, made: Round, scenes: ScenesPaths) -> Judges:
    """The round's checkpoints, each with the record of the data that such a training sees, and its curve."""
    people = [PairSource(scenes.human, human=True)]
    web = [PairSource(path) for path in workspace.shard_paths()]
    digests: dict[str, str] = {}
    for place, (name, (steps, objectives)) in enumerate(TRAININGS.items()):
        seen = see([*web, *people] if name == "med" else people, made.number)
        origin = {"start": digests.get("med", [None, None]), "data": seen.digest, "steps": steps, "seed": 0}
        digests[name] = save_counting_med(getattr(made, name), 8 * made.number + place, origin, seen.record)
        log = MetricsLog(made.metrics / f"{name}.jsonl", name, 0)
        for step in range(20, steps + 1, 20):
            losses = {loss: round(_loss(step + 20 * made.number, *FALLS[loss]), 4) for loss in objectives}
            log.write(step, losses, Measured(0.003, 1.5, 60.0, 0.125, 0))
    embed = TextEmbedder.load(made.filter)
    return Judges(made.number, *JUDGES[made.number], digests["captioner"], digests["filter"], embed)


def _loss(step: int, end: float, above: float) -> float:
    return end + above * 20 / step


def _images(shard: Path) -> list[Row]:
    return [row for row in read_shard(shard).to_pylist() if row["status"] == "ok"]


def _write_embeddings(
    made: Round, shard: Path, images: Sequence[Row], vectors: Sequence[np.ndarray], judges: Judges
) -> None:
    table = embedding_table([row["uid"] for row in images], vectors, WIDTH)
    mark, described = embedding_mark(shard.stem, judges.filter, "fp32"), {FILTER_KEY: judges.filter}
    with part_writer(made.embeddings / shard.name, table.schema, EMBEDDING_VERSION, mark, described) as writer:
        writer.write(table)


def _annotate(
    made: Round,
    shard: Path,
    images: Sequence[Row],
    vectors: Sequence[np.ndarray],
    truth: Mapping[str, Truth],
    judges: Judges,
) -> None:
    """A shard's annotations, and what of them passes."""
    rows = [
        {"shard": shard.stem, **row}
        for image, vector in zip(images, vectors, strict=True)
        for row in annotate_image(image, vector, truth[image["uid"]], judges)
    ]
    part = made.annotations / shard.name
    table = pa.Table.from_pylist(rows, ANNOTATION_SCHEMA)
    write_part(part, table, ANNOTATION_VERSION, "made up", {IMAGES_KEY: str(len(images))})
    publish_shard(part, shard, made.corpus / shard.name, "itm_score > 0.5", made.number)


def _finish(workspace: Workspace, number: int, scenes: ScenesPaths) -> None:
    """What a round has beside its parts."""
    made = workspace.round(number)
    publish_human(PairTable(str(scenes.human)), made.corpus, number)
    numbers = {"audit": audit(workspace, number, scenes.truth), "retrieval": {}, "captioning": {}}
    write_json(made.evaluation, numbers)
    for step, seconds in SECONDS[number].items():
        made.add_seconds(step, seconds)
    parts = made.annotations.glob("*.parquet")
    made.add_images("annotate", sum(int(pq.read_metadata(part).metadata[IMAGES_KEY.encode()]) for part in parts))


def _mark_sample(workspace: Workspace, truth: Mapping[str, Truth]) -> None:
    """An audit of the last round by a person who is always right."""
    sample = draw_sample(workspace, max(JUDGES), MARKED)
    marks = {
        str(place): RIGHT if truth[pair.uid].allows(pair.text, "synthetic" if pair.candidate else "web") else WRONG
        for place, pair in enumerate(sample.drawn, start=1)
    }
    answers = workspace.root / "answers.json"
    asked = {"sample": sample.name, "round": sample.round, "seed": sample.seed, "pairs": sample.pairs}
    write_json(answers, {"schema": ANSWERS_VERSION, **asked, "answers": marks})
    audit_answers(workspace, answers)
    answers.unlink()
