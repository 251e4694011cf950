"""A made-up Captioner, which tells scenes with mistakes, and a made-up Filter, which knows the truth and errs at times.

Chance is drawn as whole numbers from a stream of its own for each text, so that no text or score depends on the order
of the work, or on how a machine rounds. Only `itc_score` is computed from embeddings, as a Filter does.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from blip_core.corpus.schemas import EMPTY_TEXT
from blip_core.evaluation.audit import RIGHT
from blip_core.med.text_embedder import TextEmbedder
from blip_core.scenes.grammar import BACKGROUNDS, COLOURS, FRAMES, SHAPES, SIZES, Scene, captions_of, is_right
from services.scenes_models import WIDTH

Row = dict[str, Any]
PROPERTIES = {
    "frame": FRAMES,
    "background": tuple(BACKGROUNDS),
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
}
HOST, OFF, SHAKE, TEXT, SCORE = range(1, 6)
"""The streams of chance."""
EMPTY_OF = 40


class Truth(NamedTuple):
    """What the generator knows of a row of the web."""

    kind: str
    scene: Scene | None

    def allows(self, text: str, source: str) -> bool:
        """Whether a text is right."""
        return self.kind == RIGHT if source == "web" else self.scene is not None and is_right(text, self.scene)


class Judges(NamedTuple):
    """The models of a round: how many of a thousand captions, and of a thousand verdicts, are wrong; the synthetic
    texts of each image; the digests of both, and the Filter's text encoder."""

    round: int
    mistold: int
    misjudged: int
    candidates: int
    captioner: str
    filter: str
    embed: TextEmbedder


def read_truth(path: Path) -> dict[str, Truth]:
    """The scenes' truth by uid."""
    rows = pq.read_table(path).to_pylist()
    scenes = [Scene.from_json(json.loads(row["scene"])) if row["scene"] else None for row in rows]
    return {row["uid"]: Truth(row["kind"], scene) for row, scene in zip(rows, scenes, strict=True)}


def chance(uid: str, *stream: int) -> np.random.Generator:
    """A stream of chance for an image, whose uid is hexadecimal."""
    return np.random.default_rng([int(uid, 16), *stream])


def embed_images(
    images: Sequence[Row], firsts: Mapping[str, str], truth: Mapping[str, Truth], judges: Judges, shake: float
) -> list[np.ndarray]:
    """Of each image what the Filter makes of its scene's words, a little off, for no two pictures of one are alike.

    `firsts` names for each sha256 one uid that has it: the same bytes have the same embedding. Returns float16 of
    length 1.
    """
    texts = judges.embed([" ".join(asdict(shown(truth[row["uid"]])).values()) for row in images])
    vectors = []
    for row, words in zip(images, texts, strict=True):
        own = firsts[row["sha256"]]
        off = chance(own, OFF).integers(-8, 9, WIDTH) / 512
        vector = np.asarray(words) + off + shake * chance(own, SHAKE).integers(-1, 2, WIDTH)
        vectors.append((vector / np.linalg.norm(vector)).astype(np.float16))
    return vectors


def annotate_image(image: Row, vector: np.ndarray, truth: Truth, judges: Judges) -> list[Row]:
    """The image's candidates with their scores, as rows of annotations but for the shard."""
    shared = {"uid": image["uid"], "url": image["url"], "image_sha256": image["sha256"]}
    shared |= {"captioner": judges.captioner, "filter": judges.filter}
    texts = list(_texts(image, truth, judges))
    embedded = judges.embed([text["text"] for text in texts])
    rows = []
    for text, words in zip(texts, embedded, strict=True):
        scores: Row = {"reason": EMPTY_TEXT}
        if words is not None:
            scores = {"itm_score": _match(image["uid"], text, truth, judges)}
            scores["itc_score"] = float(np.dot(vector.astype(np.float64), words))
        rows.append(shared | text | scores)
    return rows


def shown(truth: Truth) -> Scene:
    """The scene of a picture that can be decoded."""
    assert truth.scene is not None
    return truth.scene


def _texts(image: Row, truth: Truth, judges: Judges) -> Iterator[Row]:
    """The web text, and the Captioner's: now and then one is empty."""
    yield {"text": image["caption"], "source": "web", "candidate": 0}
    for candidate in range(1, judges.candidates + 1):
        luck = chance(image["uid"], TEXT, judges.round, candidate)
        scene = shown(truth)
        if luck.integers(1000) < judges.mistold:
            name = list(PROPERTIES)[luck.integers(len(PROPERTIES))]
            others = [word for word in PROPERTIES[name] if word != getattr(scene, name)]
            scene = replace(scene, **{name: others[luck.integers(len(others))]})
        text = "" if luck.integers(EMPTY_OF) == 0 else captions_of(scene, luck, 1)[0]
        sampled = {"logprob": -int(luck.integers(10, 150)) / 100, "seed": int(luck.integers(2**31))}
        yield {"text": text, "source": "synthetic", "candidate": candidate, **sampled}


def _match(uid: str, text: Row, truth: Truth, judges: Judges) -> float:
    """The probability that the Filter gives: near 1 for what it takes for right, near 0 for the rest."""
    luck = chance(uid, SCORE, judges.round, text["candidate"])
    right = truth.allows(text["text"], text["source"]) != (luck.integers(1000) < judges.misjudged)
    doubt = int(luck.integers(1, 100)) ** 3 * 49 // 100  # of a million; seldom near the half
    return (1_000_000 - doubt if right else doubt) / 1_000_000
