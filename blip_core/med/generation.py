"""Decoding: nucleus sampling, beam search and greedy, over anything that predicts the next token.

A sampled row draws from uniform numbers of its own, so that its text does not depend on the rows beside it.
Nucleus sampling: Holtzman et al., ICLR 2020; BLIP uses p = 0.9 (section 4.3).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.med.med import MED
from blip_core.med.text_transformer import CrossKeys, DecoderCache
from blip_core.med.tokenizer import Tokenizer
from blip_core.settings import Settings, setting


@dataclass(frozen=True)
class GenerationConfig(Settings):
    """How captions are decoded."""

    method: Literal["nucleus", "beam", "greedy"] = setting("nucleus", "how the next token is chosen")
    p: float = setting(0.9, "nucleus: the smallest set of tokens with this probability is sampled from", gt=0, le=1)
    temperature: float = setting(1.0, "nucleus: divides the logits before sampling", gt=0, le=10)
    top_k: int = setting(0, "nucleus: at most so many tokens are sampled from; 0 is no limit", ge=0)
    beams: int = setting(3, "beam: how many texts are kept at each step", ge=1, le=32)
    max_length: int = setting(20, "longest caption in tokens, prompt counted, [DEC] and [SEP] not", ge=1, le=500)
    min_length: int = setting(5, "shortest caption in tokens, prompt counted", ge=0, le=500)
    repetition_penalty: float = setting(1.0, "above 1, tokens already in the caption become less likely", ge=1, le=10)
    prompt: str = setting("", "text that every caption begins with; left out of the result")


class Caption(NamedTuple):
    """A decoded text without prompt and [SEP], and the mean log-probability of its tokens ([SEP] counted)."""

    tokens: list[int]
    logprob: float


class NextToken(Protocol):
    """What decoding needs of a model: logits for rows that grow together."""

    def step(self, tokens: Tensor) -> Tensor:
        """Takes new tokens (R, L) of each row; returns logits (R, V) of the token after them."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keeps `rows` (R',) int64, in that order."""
        ...


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
    med: MED, tokenizer: Tokenizer, image: CrossKeys, config: GenerationConfig, seeds: Sequence[int] = ()
) -> list[tuple[str, float]]:
    """One caption a row: its text and its mean token log-probability.

    Args:
        image: of `med.cross_keys`, one row for each of the R captions wanted.
        seeds: R seeds, for nucleus sampling alone.
    """
    decoder = CachedDecoder(med, image)
    prompt = prompt_tokens(tokenizer, config.prompt)
    if config.method == "nucleus":
        uniforms = torch.stack([row_uniforms(seed, config.max_length) for seed in seeds]).to(image.device)
        captions = sample(decoder, prompt, uniforms, tokenizer.end_id, config)
    elif config.method == "beam":
        captions = beam_search(decoder, prompt, len(image), tokenizer.end_id, config, image.device)
    else:
        captions = greedy(decoder, prompt, len(image), tokenizer.end_id, config, image.device)
    return [(tokenizer.decode(caption.tokens), caption.logprob) for caption in captions]


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
    """Nucleus sampling. `uniforms` (R, max_length) are the rows' random numbers; finished rows leave the batch."""
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
    totals, lengths = [0.0] * rows, [0] * rows
    active = torch.arange(rows, device=device)
    tokens = history = torch.tensor([prompt] * rows, device=device)
    given = len(prompt) - 1
    for step in range(config.max_length - given):
        log_probabilities = F.log_softmax(decoder.step(tokens).float(), dim=-1)
        scores = restrict(log_probabilities, history, step + given, end_id, config)
        chosen = scores.argmax(dim=-1) if uniforms is None else nucleus(scores, uniforms[active, step], config)
        picked = log_probabilities.gather(1, chosen[:, None]).squeeze(1)
        for row, token, logprob in zip(active.tolist(), chosen.tolist(), picked.tolist(), strict=True):
            totals[row] += logprob
            lengths[row] += 1
            if token != end_id:
                texts[row].append(token)
        staying = (chosen != end_id).nonzero().squeeze(1)
        if len(staying) == 0:
            break
        if len(staying) < len(active):
            decoder.select(staying)
            active, chosen, history = active[staying], chosen[staying], history[staying]
        tokens = chosen[:, None]
        history = torch.cat([history, tokens], dim=1)
    return [Caption(text, total / max(1, length)) for text, total, length in zip(texts, totals, lengths, strict=True)]


def restrict(log_probabilities: Tensor, history: Tensor, length: int, end_id: int, config: GenerationConfig) -> Tensor:
    """Scores (R, V) after minimum length and repetition penalty (Keskar et al., 2019)."""
    scores = log_probabilities
    if config.repetition_penalty != 1.0:
        seen = scores.gather(1, history)
        scores = scores.scatter(1, history, seen * config.repetition_penalty)
    if length < config.min_length:
        scores = scores.clone()
        scores[:, end_id] = -torch.inf
    return scores


def nucleus(scores: Tensor, uniforms: Tensor, config: GenerationConfig) -> Tensor:
    """One token a row (R,) from the smallest set of tokens that has probability p.

    The set is ordered by falling probability (ties by token id), and the row's uniform number is looked up in its
    cumulated probabilities.
    """
    probabilities = F.softmax(scores.double() / config.temperature, dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = before < config.p
    if config.top_k:
        kept[:, config.top_k :] = False
    cumulated = (ordered * kept).cumsum(dim=-1)
    wanted = uniforms.double()[:, None] * cumulated[:, -1:]
    places = torch.searchsorted(cumulated, wanted, right=True)
    last = kept.sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, places.minimum(last)).squeeze(1)


def beam_search(
    decoder: NextToken, prompt: list[int], rows: int, end_id: int, config: GenerationConfig, device: torch.device
) -> list[Caption]:
    """The most probable text a row among `beams` kept at each step, by mean log-probability of what was generated.

    A row is done when `beams` texts have ended and no beam under way stands better than the worst of them.
    """
    beams = config.beams
    decoder.select(torch.arange(rows, device=device).repeat_interleave(beams))
    totals = torch.full((rows, beams), -torch.inf, device=device)
    totals[:, 0] = 0.0
    history = torch.tensor([prompt] * (rows * beams), device=device)
    tokens = history
    given = len(prompt) - 1
    finished: list[list[Caption]] = [[] for _ in range(rows)]
    for step in range(config.max_length - given):
        log_probabilities = F.log_softmax(decoder.step(tokens).float(), dim=-1)
        scores = restrict(log_probabilities, history, step + given, end_id, config)
        vocabulary = scores.shape[1]
        candidates = (totals[:, :, None] + scores.view(rows, beams, vocabulary)).flatten(1)
        best, places = candidates.topk(2 * beams, dim=1)
        parents = places // vocabulary
        chosen = places % vocabulary
        totals, kept = _advance(finished, history, best, parents, chosen, end_id, len(prompt), beams)
        order = (torch.arange(rows, device=device)[:, None] * beams + parents.gather(1, kept)).flatten()
        tokens = chosen.gather(1, kept).flatten()[:, None]
        decoder.select(order)
        history = torch.cat([history[order], tokens], dim=1)
        done = _done(finished, totals, step + 1, beams)
        if done.all():
            break
        # a row that is done finds nothing more, however long the others take
        totals = totals.masked_fill(done[:, None], -torch.inf)
    _finish(finished, history, totals, len(prompt), beams)
    return [max(texts, key=lambda caption: caption.logprob) for texts in finished]


def _advance(
    finished: list[list[Caption]],
    history: Tensor,
    best: Tensor,
    parents: Tensor,
    chosen: Tensor,
    end_id: int,
    prompt_length: int,
    beams: int,
) -> tuple[Tensor, Tensor]:
    """Puts texts that ended aside; returns the beams' totals (rows, beams) and their places among the candidates."""
    ended = chosen == end_id
    for row, place in ended.nonzero().tolist():
        total = best[row, place].item()
        if place < beams and total > -torch.inf:
            text = history[row * beams + int(parents[row, place]), prompt_length:].tolist()
            finished[row].append(Caption(text, total / (len(text) + 1)))
            finished[row].sort(key=lambda caption: -caption.logprob)
            del finished[row][beams:]
    kept = ended.to(torch.int8).argsort(dim=1, stable=True)[:, :beams]
    return best.gather(1, kept).masked_fill(ended.gather(1, kept), -torch.inf), kept


def _done(finished: list[list[Caption]], totals: Tensor, length: int, beams: int) -> Tensor:
    hopes = (totals.max(dim=1).values / length).tolist()
    done = [len(texts) >= beams and texts[-1].logprob >= hope for texts, hope in zip(finished, hopes, strict=True)]
    return torch.tensor(done, device=totals.device)


def _finish(finished: list[list[Caption]], history: Tensor, totals: Tensor, prompt_length: int, beams: int) -> None:
    for row, texts in enumerate(finished):
        if len(texts) < beams:
            for beam in range(beams):
                total = totals[row, beam].item()
                if total > -torch.inf:
                    text = history[row * beams + beam, prompt_length:].tolist()
                    texts.append(Caption(text, total / max(1, len(text))))
