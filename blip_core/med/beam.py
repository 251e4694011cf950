"""Beam search: the most probable text among those that begin with the most probable openings.

When a text counts as ended, when a row is done, and what a text is worth is as in transformers' generate.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.med.decoding import Caption, GenerationConfig
from blip_core.med.next_token import NextToken, restrict


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
