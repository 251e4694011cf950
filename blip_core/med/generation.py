"""Decoding: nucleus sampling, beam search and greedy, over anything that predicts the next token.

A sampled row draws from uniform numbers of its own, so that its text does not depend on the rows beside it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.med.beam import beam_search
from blip_core.med.decoding import Caption, GenerationConfig
from blip_core.med.med import MED
from blip_core.med.next_token import NextToken, restrict
from blip_core.med.sampling import nucleus
from blip_core.med.static_decoder import Plan, static_decoder
from blip_core.med.text_transformer import CrossKeys, DecoderCache
from blip_core.med.tokenizer import Tokenizer

# Rows that are finished leave the batch when no more than this share would stay: the images' keys and values of the
# others are copied then, which costs as much as another token or two.
STAYING = 0.75


class CachedDecoder:
    """MED's image-grounded text decoder with keys and values cached. `image` has one image a row."""

    def __init__(self, med: MED, image: CrossKeys) -> None:
        self.med = med
        self.cache = DecoderCache(image)

    def step(self, tokens: Tensor) -> Tensor:
        return self.med.decode_step(tokens, self.cache)

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)


@torch.inference_mode()
def generate(
    med: MED,
    tokenizer: Tokenizer,
    image: CrossKeys,
    config: GenerationConfig,
    seeds: Sequence[int] = (),
    static: bool = False,
) -> list[tuple[str, float]]:
    """One caption a row: its text and its mean token log-probability.

    Args:
        image: of `med.cross_keys`, one row for each of the R captions wanted, or one for so many of them, which then
            stand one after the other.
        seeds: R seeds, which nucleus sampling alone draws from; without them there are as many captions as images.
        static: decodes in fixed shapes, on a GPU by a CUDA graph that is captured once for each model, configuration
            and number of captions of an image, and for the largest batch. Beam search knows no such way.
    """
    rows = len(seeds) or len(image)
    if rows % len(image):
        raise ValueError(f"{rows} seeds for {len(image)} images; expected as many for each image")
    prompt = prompt_tokens(tokenizer, config.prompt)
    uniforms = None
    if config.method == "nucleus":
        uniforms = torch.stack([row_uniforms(seed, config.max_length) for seed in seeds]).to(image.device)
    if static and config.method != "beam":
        plan = Plan(tuple(prompt), tokenizer.end_id, tokenizer.pad_id, config)
        decoder = static_decoder(med, image, rows // len(image), plan)
        captions = decoder.decode(med, image, uniforms)
    else:
        captions = _decode(med, tokenizer.end_id, prompt, image, rows, config, uniforms)
    return [(tokenizer.decode(caption.tokens), caption.logprob) for caption in captions]


def _decode(
    med: MED,
    end_id: int,
    prompt: list[int],
    image: CrossKeys,
    rows: int,
    config: GenerationConfig,
    uniforms: Tensor | None,
) -> list[Caption]:
    owner = torch.arange(len(image), device=image.device).repeat_interleave(rows // len(image))
    decoder = CachedDecoder(med, image if rows == len(image) else image.select(owner))
    if uniforms is not None:
        return sample(decoder, prompt, uniforms, end_id, config)
    decode = beam_search if config.method == "beam" else greedy
    return decode(decoder, prompt, rows, end_id, config, image.device)


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """[DEC], then the prompt's tokens."""
    pieces = tokenizer.pieces(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    return [tokenizer.decode_id, *pieces]


def caption_seed(run_seed: int, image_sha256: str, candidate: int) -> int:
    """The seed of one caption: the same in any batch, shard order, worker or restart. 0..2^63 - 1."""
    text = f"{run_seed}/{image_sha256}/{candidate}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def row_uniforms(seed: int, length: int) -> Tensor:
    """`length` numbers in [0, 1), float64, from the counter-based Philox generator."""
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=seed)).random(length))


def sample(
    decoder: NextToken, prompt: list[int], uniforms: Tensor, end_id: int, config: GenerationConfig
) -> list[Caption]:
    """Nucleus sampling. `uniforms` (R, max_length) are the rows' random numbers; finished rows leave by and by."""
    return _decode_rows(decoder, prompt, uniforms.shape[0], end_id, config, uniforms, uniforms.device)


def greedy(
    decoder: NextToken, prompt: list[int], rows: int, end_id: int, config: GenerationConfig, device: torch.device
) -> list[Caption]:
    """The most probable token at every step."""
    return _decode_rows(decoder, prompt, rows, end_id, config, None, device)


def _decode_rows(
    decoder: NextToken,
    prompt: list[int],
    rows: int,
    end_id: int,
    config: GenerationConfig,
    uniforms: Tensor | None,
    device: torch.device,
) -> list[Caption]:
    texts: list[list[int]] = [[] for _ in range(rows)]
    totals, lengths, ended = [0.0] * rows, [0] * rows, [False] * rows
    active = torch.arange(rows, device=device)
    tokens = history = torch.tensor([prompt] * rows, device=device)
    given = len(prompt) - 1
    for step in range(config.max_length - given):
        logits = decoder.step(tokens).float()
        scores = restrict(logits, history, step + given, end_id, config)
        chosen = scores.argmax(dim=-1) if uniforms is None else nucleus(scores, uniforms[active, step], config)
        picked = F.log_softmax(logits, dim=-1).gather(1, chosen[:, None]).squeeze(1)
        for row, token, logprob in zip(active.tolist(), chosen.tolist(), picked.tolist(), strict=True):
            if not ended[row]:
                totals[row] += logprob
                lengths[row] += 1
                ended[row] = token == end_id
                texts[row] += [token] * (not ended[row])
        staying = [place for place, row in enumerate(active.tolist()) if not ended[row]]
        if not staying:
            break
        if len(staying) <= STAYING * len(active):
            kept = torch.tensor(staying, device=device)
            decoder.select(kept)
            active, chosen, history = active[kept], chosen[kept], history[kept]
        tokens = chosen[:, None]
        history = torch.cat([history, tokens], dim=1)
    return [Caption(text, total / max(1, length)) for text, total, length in zip(texts, totals, lengths, strict=True)]
