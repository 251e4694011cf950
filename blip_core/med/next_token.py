"""What decoding needs of a model, and what penalty and minimum length make of its scores.

What they act on, and in what order, is as in transformers' generate, on which the official code relies.
"""

from typing import Protocol

import torch
from torch import Tensor

from blip_core.med.decoding import GenerationConfig


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
