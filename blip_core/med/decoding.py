"""What decoding is asked for, what it needs of a model, and what it gives.

What penalty, lengths and limits act on, and in what order, is as in transformers' generate, on which the official code
relies; its lengths count [DEC] as well.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

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


def restrict(scores: Tensor, history: Tensor, length: int | Tensor, end_id: int, config: GenerationConfig) -> Tensor:
    """Scores (R, V) after repetition penalty (Keskar et al., 2019, for scores of either sign) and minimum length.

    Args:
        scores: logits where one token is chosen, log-probabilities where beams are compared.
        history: (R, L), all tokens so far: [DEC], the prompt and what was generated count as said.
        length: of the caption so far, prompt counted; a tensor (1,) where a graph is run for each length.
    """
    if config.repetition_penalty != 1.0:
        said = scores.gather(1, history)
        rarer = torch.where(said < 0, said * config.repetition_penalty, said / config.repetition_penalty)
        scores = scores.scatter(1, history, rarer)
    if isinstance(length, Tensor) or length < config.min_length:
        end = torch.arange(scores.shape[1], device=scores.device) == end_id
        scores = scores.masked_fill(end & (length < config.min_length), -torch.inf)
    return scores
