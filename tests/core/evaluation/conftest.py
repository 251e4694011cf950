"""A workspace with one whole round of 60 scenes, as the cycle would leave it, and the truth of its texts."""

import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ANNOTATION_VERSION, write_part
from blip_core.corpus.selection import publish_human, publish_shard
from blip_core.data.shards import SHARD_SCHEMA
from blip_core.data.tables import PairTable
from blip_core.evaluation.pictures import thumbnail
from blip_core.files import write_json
from blip_core.scenes import grammar
from blip_core.scenes.grammar import Scene
from blip_core.workspace import Workspace

SHARD = "5ce4e50000000001"
COLOURS = tuple(grammar.COLOURS)[:3]
SHAPES = grammar.SHAPES[:2]
SCRIPT = "<script>alert('shapes & more')</script> http://ads.test/buy"


class FinishedRound(NamedTuple):
    """A round and, kept by the test alone, whether each (uid, candidate) is right."""

    workspace: Workspace
    truth: Path
    human: PairTable
    right: dict[tuple[str, int], bool]
    scores: dict[tuple[str, int], float]


def tell(colour: str, shape: str) -> str:
    """The right caption of the scene of that object."""
    return f"a large {colour} {shape} on a white background in a blue frame"


def draw(colour: str, shape: str) -> bytes:
    picture = Image.new("RGB", (96, 72), "white")
    pen = ImageDraw.Draw(picture)
    if shape == SHAPES[0]:
        pen.ellipse((24, 12, 72, 60), fill=colour)
    else:
        pen.rectangle((24, 12, 72, 60), fill=colour)
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return file.getvalue()


def make_round(root: Path) -> FinishedRound:
    workspace = Workspace.open(root / "workspace")
    rng = np.random.default_rng(7)
    shard, annotations, truth = [], [], []
    right: dict[tuple[str, int], bool] = {}
    scores: dict[tuple[str, int], float] = {}
    for number in range(60):
        uid, url = f"img-{number:03d}", f"http://web.test/{number}.jpg"
        if number >= 50:
            shard.append({"uid": uid, "url": url, "caption": "gone", "status": "failed", "reason": "not_found"})
            truth.append({"uid": uid, "kind": "right", "scene": None})
            continue
        colour, shape = COLOURS[number % 3], SHAPES[number % 2]
        other = COLOURS[(number + 1) % 3]
        kind = ("right", "mismatched", "junk")[number % 5 % 3]
        web = {"right": tell(colour, shape), "mismatched": tell(other, shape), "junk": SCRIPT}[kind]
        synthetic_right = number % 4 != 0
        synthetic = tell(colour if synthetic_right else other, shape)
        image = draw(colour, shape)
        digest = hashlib.sha256(image).hexdigest()
        size = {"width": 96, "height": 72, "original_width": 96, "original_height": 72}
        shard.append({"uid": uid, "url": url, "caption": web, "status": "ok", "sha256": digest, "image": image} | size)
        scene = Scene("blue", "white", shape, colour, "large")
        truth.append({"uid": uid, "kind": kind, "scene": json.dumps(scene.to_json())})
        for candidate, (source, text) in enumerate((("web", web), ("synthetic", synthetic))):
            is_right = kind == "right" if source == "web" else synthetic_right
            score = float(np.float32(rng.beta(5, 2) if is_right else rng.beta(2, 5)))
            right[uid, candidate], scores[uid, candidate] = is_right, score
            annotations.append(
                {"uid": uid, "shard": SHARD, "url": url, "image_sha256": digest, "text": text, "source": source}
                | {"candidate": candidate, "itm_score": score, "itc_score": score / 2, "captioner": "c0ffee"}
                | {"filter": "f11733"}
                | ({"logprob": -1.0, "seed": number} if source == "synthetic" else {})
            )
    shard_table = pa.Table.from_pylist(shard, SHARD_SCHEMA)
    workspace.shards.mkdir()
    metadata = {"capfilt.schema": "shard/1", "capfilt.settings": "0"}
    pq.write_table(shard_table.replace_schema_metadata(metadata), workspace.shard(SHARD), compression="zstd")
    paths = workspace.round(1)
    part = paths.annotations / f"{SHARD}.parquet"
    write_part(part, pa.Table.from_pylist(annotations, ANNOTATION_SCHEMA), ANNOTATION_VERSION, "0")
    publish_shard(part, workspace.shard(SHARD), paths.corpus / part.name, "itm_score > 0.5", 1)
    pairs = [{"image": draw(colour, SHAPES[0]), "caption": [tell(colour, SHAPES[0])]} for colour in COLOURS]
    pq.write_table(pa.Table.from_pylist(pairs), root / "human.parquet")
    human = PairTable(str(root / "human.parquet"))
    publish_human(human, paths.corpus, 1)
    pq.write_table(pa.Table.from_pylist(truth), root / "truth.parquet")
    return FinishedRound(workspace, root / "truth.parquet", human, right, scores)


@pytest.fixture
def finished(tmp_path: Path) -> FinishedRound:
    """Downloaded, annotated and published; not evaluated."""
    return make_round(tmp_path)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> FinishedRound:
    """The same with an evaluation, metrics and seconds, whose numbers are made up; for tests that change nothing."""
    finished = make_round(tmp_path_factory.mktemp("evaluated"))
    paths = finished.workspace.round(1)

    def recall(r1: float) -> dict[str, float]:
        return {"r1": r1, "r5": r1 + 0.2, "r10": r1 + 0.3}

    quality = {"med": 0.2, "retrained-raw": 0.25, "retrained": 0.4}
    retrieval = {name: {"image_to_text": recall(q + 0.1), "text_to_image": recall(q)} for name, q in quality.items()}
    captioning = {name: {"bleu4": q + 0.1, "cider": 3 * q} for name, q in quality.items()}
    interval = [0.91, 0.98]
    audit = {"web_noise": 0.6, "corpus_noise": 0.1, "synthetic_noise": 0.25, "filter_auc": 0.95}
    audit |= {"filter_auc_interval": interval, "filter_precision": 0.9, "filter_recall": 0.8}
    examples = {
        name: [
            {"uid": f"held-{colour}", "image": thumbnail(draw(colour, SHAPES[1])), "text": tell(colour, shape)}
            | {"references": [tell(colour, SHAPES[1])]}
            for colour in COLOURS
        ]
        for name, shape in (("retrained-raw", SHAPES[0]), ("retrained", SHAPES[1]))
    }
    evaluation = {"retrieval": retrieval, "captioning": captioning, "audit": audit, "examples": examples}
    write_json(paths.evaluation, evaluation)
    paths.metrics.mkdir()
    trained = {"retrained": ("itc", "itm", "lm"), "captioner": ("lm",), "med": ("itc", "itm", "lm")}
    for model, objectives in trained.items():
        lines = []
        for step in range(20, 1001, 20):
            losses = {"itc": 4 / (1 + step / 300), "itm": 0.64 / (1 + step / 900), "lm": 3 / (1 + step / 200)}
            line = {
                "model": model,
                "step": step,
                **{name: losses[name] if name in objectives else None for name in losses},
            }
            lines.append(json.dumps(line))
        (paths.metrics / f"{model}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for step, seconds in {"download": 12.5, "pretrain": 140.2, "annotate": 33.3, "publish": 0.4}.items():
        paths.add_seconds(step, seconds)
    return finished
