"""A trained MED on held-out human pairs: retrieval (ITC ranking, ITM re-ranking) and captioning.

Retrieval as in BLIP's released evaluation: each query's best `rerank` candidates by ITC cosine are scored
anew with ITM logit of 'match' + ITC cosine, and all others stand behind them. There all of these have one score;
here they keep the order of their cosines, which changes no recall at `rerank` or less.
"""

import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_core.data.images import decode_image
from blip_core.data.tables import Pair, PairTable, iterate_pairs
from blip_core.data.transforms import eval_transform
from blip_core.errors import InputError
from blip_core.evaluation.captioning import caption_scores
from blip_core.evaluation.pictures import thumbnail
from blip_core.evaluation.protocol import EvaluationConfig
from blip_core.evaluation.retrieval import recall_at
from blip_core.med.checkpoint import LoadedMED, load_med
from blip_core.med.decoding import GenerationConfig
from blip_core.med.generation import generate

BEHIND = -100.0  # the official evaluation's score of what was not re-ranked, below any logit
PAIRS_PER_IMAGE = 4  # an ITM pair needs less memory than the encoding of an image


def evaluate_checkpoint(folder: Path, held_out: PairTable, config: EvaluationConfig) -> dict[str, Any]:
    """Scores of one checkpoint, JSON-like.

    Returns {"retrieval": {"images", "texts", "image_to_text": {"r1", "r5", "r10"}, "text_to_image": {...}},
    "captioning": {"bleu4", "cider"}, "examples": [{"uid", "image_sha256", "image", "text", "references"}, ...]}, recall
    0..1. Raises CheckpointError for the folder and InputError for the table, or where it holds fewer than two images.
    """
    loaded = load_med(folder, "cuda" if torch.cuda.is_available() else "cpu")
    pairs = list(islice(iterate_pairs(held_out), config.max_images))
    if len(pairs) < 2:
        raise InputError(f"held_out {held_out.path}: {len(pairs)} images; at least 2 are needed to rank anything")
    with torch.inference_mode():
        features = _encode_images(loaded, pairs, config.batch_size)
        retrieval = _retrieval(loaded, features, pairs, config)
        captions = _captions(loaded, features, config)
    references = [pair.captions for pair in pairs]
    examples = [
        {
            "uid": pair.uid,
            "image_sha256": hashlib.sha256(pair.image).hexdigest(),
            "image": thumbnail(pair.image),
            "text": text,
            "references": pair.captions,
        }
        for pair, text in islice(zip(pairs, captions, strict=True), config.examples)
    ]
    return {"retrieval": retrieval, "captioning": caption_scores(captions, references), "examples": examples}


def rerank_scores(similarities: Tensor, match_logits: Tensor, scored: Tensor) -> Tensor:
    """Scores (I, T) after re-ranking: ITC cosine + ITM logit where `scored` (bool) is true, cosine - 100 elsewhere."""
    return torch.where(scored, match_logits, BEHIND) + similarities


def best_of_each(similarities: Tensor, k: int, dim: int) -> Tensor:
    """Mask (I, T) of the k largest along `dim`: 1 is each image's texts, 0 each text's images."""
    best = similarities.topk(min(k, similarities.shape[dim]), dim=dim).indices
    return torch.zeros_like(similarities, dtype=torch.bool).scatter_(dim, best, True)


def _encode_images(loaded: LoadedMED, pairs: list[Pair], batch_size: int) -> Tensor:
    """Features (I, N, D)."""
    transform = eval_transform(loaded.med.image_size)
    features = []
    for start in range(0, len(pairs), batch_size):
        images = [transform(decode_image(pair.image)) for pair in pairs[start : start + batch_size]]
        features.append(loaded.med.encode_image(torch.stack(images).to(_device(loaded))))
    return torch.cat(features)


def _retrieval(loaded: LoadedMED, features: Tensor, pairs: list[Pair], config: EvaluationConfig) -> dict[str, Any]:
    text_image = [number for number, pair in enumerate(pairs) for _ in pair.captions]
    texts = [text for pair in pairs for text in pair.captions]
    batch = loaded.tokenizer(texts)
    ids, mask = batch.ids.to(features.device), batch.mask.to(features.device)
    embeddings = [
        loaded.med.embed_text(*_trim(ids[start : start + config.batch_size], mask[start : start + config.batch_size]))
        for start in range(0, len(texts), config.batch_size)
    ]
    similarities = loaded.med.project_image(features) @ torch.cat(embeddings).T  # (I, T)
    of_images = best_of_each(similarities, config.rerank, dim=1)
    of_texts = best_of_each(similarities, config.rerank, dim=0)
    logits = _match_logits(loaded, features, ids, mask, of_images | of_texts, config.batch_size * PAIRS_PER_IMAGE)
    return {
        "images": len(pairs),
        "texts": len(texts),
        "image_to_text": recall_at(rerank_scores(similarities, logits, of_images), text_image)["image_to_text"],
        "text_to_image": recall_at(rerank_scores(similarities, logits, of_texts), text_image)["text_to_image"],
    }


def _match_logits(
    loaded: LoadedMED, features: Tensor, ids: Tensor, mask: Tensor, wanted: Tensor, batch_size: int
) -> Tensor:
    """ITM logits of 'match' (I, T), computed where `wanted`. Texts of like length share a batch, to pad little."""
    logits = torch.zeros(wanted.shape, device=features.device)
    images, texts = wanted.nonzero(as_tuple=True)
    order = mask.sum(dim=1)[texts].argsort(stable=True)
    for rows in order.split(batch_size):
        image, text = images[rows], texts[rows]
        seen, owner = image.unique(return_inverse=True)
        keys = loaded.med.cross_keys(features[seen]).select(owner)
        logits[image, text] = loaded.med.match(keys, *_trim(ids[text], mask[text]))[:, 1].float()
    return logits


def _captions(loaded: LoadedMED, features: Tensor, config: EvaluationConfig) -> list[str]:
    generation = GenerationConfig(
        method="beam" if config.beam_size > 1 else "greedy",
        beams=config.beam_size,
        max_length=config.max_length,
        min_length=config.min_length,
        repetition_penalty=config.repetition_penalty,
        prompt=config.prompt,
    )
    captions: list[str] = []
    for rows in features.split(config.batch_size):
        image = loaded.med.cross_keys(rows)
        captions += [text for text, _ in generate(loaded.med, loaded.tokenizer, image, generation)]
    return captions


def _trim(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The batch without the columns that are padding in every row."""
    longest = int(mask.sum(dim=1).max())
    return ids[:, :longest], mask[:, :longest]


def _device(loaded: LoadedMED) -> torch.device:
    return next(loaded.med.parameters()).device
