"""`capfilt caption`: what a Captioner writes for images, and what a Filter says of it.

The seeds are those of annotation (run seed, sha256 of the file, candidate): a picture's captions are what `capfilt
annotate` writes for the same bytes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter, Score
from blip_core.data.decoding import decode
from blip_core.data.transforms import normalise
from blip_core.med.decoding import GenerationConfig
from blip_core.med.generation import caption_seed
from blip_core.med.inference import Precision
from flows.pictures import read_picture

_BATCH = 16

COLUMNS = {"image": pa.string(), "candidate": pa.int8(), "caption": pa.string(), "logprob": pa.float64()}
SCORES = {"itm_score": pa.float64(), "itc_score": pa.float64()}


def caption_images(
    images: Sequence[Path],
    captioner: str,
    generation: GenerationConfig,
    candidates: int = 1,
    seed: int = 0,
    precision: Precision = "fp32",
    filter: str | None = None,
    tokenizer: str | None = None,
) -> pa.Table:
    """One row a caption: image, candidate (1..candidates), caption, logprob (mean of its tokens).

    With a Filter also itm_score (probability of 'match', 0..1) and itc_score (cosine, -1..1), null for a caption
    without a word. Raises InputError for a file that is no whole image, before a model is loaded; CheckpointError as
    `Captioner.load` and `Filter.load` do.
    """
    files = [read_picture(path) for path in images]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    writer = Captioner.load(captioner, device, precision, tokenizer)
    judge = Filter.load(filter, device, tokenizer=tokenizer, precision=precision) if filter else None
    rows: list[dict[str, Any]] = []
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        pixels = decode(batch, [model.med.image_size for model in (writer, judge) if model]).pixels
        digests = [hashlib.sha256(data).hexdigest() for data in batch]
        seeds = [[caption_seed(seed, digest, number) for number in range(1, 1 + candidates)] for digest in digests]
        captions = writer.caption(_view(pixels, writer, device), generation, seeds)
        texts = [[text for text, _ in row] for row in captions]
        scores = judge.judge(_view(pixels, judge, device), texts) if judge else None
        rows += _rows([str(path) for path in images[start : start + _BATCH]], captions, scores)
    return pa.Table.from_pylist(rows, pa.schema(COLUMNS | (SCORES if filter else {})))


def _rows(
    names: list[str], captions: list[list[tuple[str, float]]], scores: list[list[Score | None]] | None
) -> Iterator[dict[str, Any]]:
    for place, name in enumerate(names):
        for number, (text, logprob) in enumerate(captions[place]):
            score = scores[place][number] if scores else None
            scored = {"itm_score": score.itm, "itc_score": score.itc} if score else {}
            yield {"image": name, "candidate": number + 1, "caption": text, "logprob": logprob, **scored}


def _view(pixels: dict[int, Tensor], model: Captioner | Filter, device: str) -> Tensor:
    return normalise(pixels[model.med.image_size].to(device))
