"""Decoding: nucleus sampling, beam search and greedy, over anything that predicts the next token.

A sampled row draws from uniform numbers of its own, so that its text does not depend on the rows beside it.
Nucleus sampling: Holtzman et al., ICLR 2020; BLIP uses p = 0.9 (section 4.3). What penalty, lengths and limits act on,
and in what order, is as in transformers' generate, on which the official code relies; its lengths count [DEC] as well.
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
    top_k: int = setting(
        0, "nucleus: the so many most probable tokens, and those equal to the last, are all that p sees; 0: any", ge=0
    )
    beams: int = setting(3, "beam: how many texts are kept at each step", ge=1, le=32)
    max_length: int = setting(20, "longest caption in tokens, prompt counted, [DEC] and [SEP] not", ge=1, le=500)
    min_length: int = setting(5, "shortest caption in tokens, prompt counted, [DEC] and [SEP] not", ge=0, le=500)
    repetition_penalty: float = setting(
        1.0, "above 1, tokens already in prompt or caption become less likely", ge=1, le=10
    )
    prompt: str = setting("", "text that every caption begins with; left out of the result")


class Caption(NamedTuple):
    """A decoded text without prompt and [SEP], and the mean log-probability of its tokens ([SEP] counted).

    The log-probability is the model's own, whatever penalties and limits were put on it.
    """

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
        logits = decoder.step(tokens).float()
        scores = restrict(logits, history, step + given, end_id, config)
        chosen = scores.argmax(dim=-1) if uniforms is None else nucleus(scores, uniforms[active, step], config)
        picked = F.log_softmax(logits, dim=-1).gather(1, chosen[:, None]).squeeze(1)
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


def restrict(scores: Tensor, history: Tensor, length: int, end_id: int, config: GenerationConfig) -> Tensor:
    """Scores (R, V) after repetition penalty (Keskar et al., 2019, for scores of either sign) and minimum length.

    Args:
        scores: logits where one token is chosen, log-probabilities where beams are compared.
        history: (R, L), all tokens so far: [DEC], the prompt and what was generated count as said.
        length: of the caption so far, prompt counted.
    """
    if config.repetition_penalty != 1.0:
        said = scores.gather(1, history)
        rarer = torch.where(said < 0, said * config.repetition_penalty, said / config.repetition_penalty)
        scores = scores.scatter(1, history, rarer)
    if length < config.min_length:
        scores = scores.clone()
        scores[:, end_id] = -torch.inf
    return scores


def nucleus(scores: Tensor, uniforms: Tensor, config: GenerationConfig) -> Tensor:
    """One token a row (R,) of those that may be sampled, where the row's uniform number (R,) falls among them."""
    probabilities, tokens = sampled_from(scores, config)
    cumulated = probabilities.cumsum(dim=-1)
    wanted = uniforms.double()[:, None] * cumulated[:, -1:]
    places = torch.searchsorted(cumulated, wanted, right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, places.minimum(last)).squeeze(1)


def sampled_from(scores: Tensor, config: GenerationConfig) -> tuple[Tensor, Tensor]:
    """What may be sampled: the smallest set of tokens that has probability p among the `top_k` most probable.

    Returns probabilities (R, K) float64, falling along the row (ties by token id) and zero outside of the set, and
    their tokens (R, K). Temperature, top_k and p act in this order, p on what top_k leaves.
    """
    ordered, tokens = _in_order(scores, config.top_k)
    probabilities = F.softmax(ordered.double() / config.temperature, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return probabilities * (before < config.p), tokens


def _in_order(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores (R, K) in falling order and their tokens: all, or those not below the k-th; others are -inf."""
    if not 0 < top_k < scores.shape[1]:
        return scores.sort(dim=-1, descending=True, stable=True)
    least = scores.topk(top_k, dim=-1).values[:, -1:]
    # sorting so few is a hundred times faster than sorting a vocabulary
    widest = int((scores >= least).sum(dim=-1).max())
    tokens = scores.topk(widest, dim=-1).indices.sort(dim=-1).values
    ordered, places = scores.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return ordered.masked_fill(ordered < least, -torch.inf), tokens.gather(1, places)


class _Candidates(NamedTuple):
    """Continuations of a row's beams, the best first, (rows, K) each."""

    scores: Tensor  # sums over the tokens so far, by which texts are compared
    logprobs: Tensor  # sums of the model's own log-probabilities
    parents: Tensor  # the beam that is continued
    tokens: Tensor  # the token that continues it

    def pick(self, places: Tensor) -> "_Candidates":
        return _Candidates(*(part.gather(1, places) for part in self))


class _Ended(NamedTuple):
    score: float
    caption: Caption


def beam_search(
    decoder: NextToken, prompt: list[int], rows: int, end_id: int, config: GenerationConfig, device: torch.device
) -> list[Caption]:
    """The most probable text a row among `beams` kept at each step, by the mean score of what was generated.

    A row is done when `beams` texts have ended and no beam under way stands better than the worst of them.
    """
    beams = config.beams
    decoder.select(torch.arange(rows, device=device).repeat_interleave(beams))
    totals = torch.full((rows, beams), -torch.inf, device=device)
    totals[:, 0] = 0.0
    logprobs = torch.zeros_like(totals)
    tokens = history = torch.tensor([prompt] * (rows * beams), device=device)
    given = len(prompt) - 1
    ended: list[list[_Ended]] = [[] for _ in range(rows)]
    for step in range(config.max_length - given):
        predicted = F.log_softmax(decoder.step(tokens).float(), dim=-1)
        scores = restrict(predicted, history, step + given, end_id, config)
        found = _continuations(totals, logprobs, scores, predicted)
        _put_aside(ended, history, found, end_id, len(prompt), beams)
        kept = found.pick((found.tokens == end_id).to(torch.int8).argsort(dim=1, stable=True)[:, :beams])
        totals, logprobs = kept.scores.masked_fill(kept.tokens == end_id, -torch.inf), kept.logprobs
        order = (torch.arange(rows, device=device)[:, None] * beams + kept.parents).flatten()
        tokens = kept.tokens.flatten()[:, None]
        decoder.select(order)
        history = torch.cat([history[order], tokens], dim=1)
        done = _done(ended, totals, step + 1, beams)
        # a row that is done finds nothing more, however long the others take
        totals = totals.masked_fill(done[:, None], -torch.inf)
        if done.all():
            break
    _cut(ended, history, totals, logprobs, len(prompt))
    return [max(texts, key=lambda text: text.score).caption for texts in ended]


def _continuations(totals: Tensor, logprobs: Tensor, scores: Tensor, predicted: Tensor) -> _Candidates:
    """The best of each row, twice as many as beams, so that enough are left when every beam finds its end."""
    rows, beams = totals.shape
    vocabulary = scores.shape[1]
    sums = (totals[:, :, None] + scores.view(rows, beams, vocabulary)).flatten(1)
    best, places = sums.topk(2 * beams, dim=1)
    parents = places // vocabulary
    own = logprobs.gather(1, parents) + predicted.view(rows, beams * vocabulary).gather(1, places)
    return _Candidates(best, own, parents, places % vocabulary)


def _put_aside(
    ended: list[list[_Ended]], history: Tensor, found: _Candidates, end_id: int, prompt_length: int, beams: int
) -> None:
    """Keeps the best `beams` texts that ended; one that did not stand among the best `beams` has lost."""
    for row, place in (found.tokens[:, :beams] == end_id).nonzero().tolist():
        total = found.scores[row, place].item()
        if total > -torch.inf:
            text = history[row * beams + int(found.parents[row, place]), prompt_length:].tolist()
            length = len(text) + 1
            caption = Caption(text, found.logprobs[row, place].item() / length)
            ended[row].append(_Ended(total / length, caption))
            ended[row].sort(key=lambda text: -text.score)
            del ended[row][beams:]


def _done(ended: list[list[_Ended]], totals: Tensor, length: int, beams: int) -> Tensor:
    hopes = (totals.max(dim=1).values / length).tolist()
    done = [len(texts) >= beams and texts[-1].score >= hope for texts, hope in zip(ended, hopes, strict=True)]
    return torch.tensor(done, device=totals.device)


def _cut(ended: list[list[_Ended]], history: Tensor, totals: Tensor, logprobs: Tensor, prompt_length: int) -> None:
    """Counts what is still under way at the greatest length among the texts that ended."""
    for row, beam in (totals > -torch.inf).nonzero().tolist():
        text = history[row * totals.shape[1] + beam, prompt_length:].tolist()
        length = max(1, len(text))
        caption = Caption(text, logprobs[row, beam].item() / length)
        ended[row].append(_Ended(totals[row, beam].item() / length, caption))
