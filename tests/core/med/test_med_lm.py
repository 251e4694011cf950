"""LM against the definition of label smoothing written as a loop."""

import math

import pytest
import torch

from blip_core.med.lm import lm_loss, predicted


def _slow(logits: torch.Tensor, ids: list[list[int]], lengths: list[int], given: int) -> float:
    """Mean over predicted tokens of the cross-entropy with 0.9 on the token and 0.1 spread over the vocabulary."""
    losses = []
    for row, tokens in enumerate(ids):
        for place in range(1, lengths[row]):
            if place < given:
                continue
            values = logits[row, place - 1].tolist()
            normaliser = math.log(sum(math.exp(value) for value in values))
            targets = [0.1 / len(values)] * len(values)
            targets[tokens[place]] += 0.9
            losses.append(-sum(t * (value - normaliser) for t, value in zip(targets, values, strict=True)))
    return sum(losses) / len(losses)


IDS = [[9, 4, 2, 5, 3], [9, 7, 3, 0, 0]]
LENGTHS = [5, 3]
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_smoothed_cross_entropy_of_the_next_token(logits: torch.Tensor) -> None:
    loss = lm_loss(logits, torch.tensor(IDS), MASK)
    assert loss.item() == pytest.approx(_slow(logits, IDS, LENGTHS, given=1), rel=1e-6)


def test_padding_and_the_last_place_are_not_predicted(logits: torch.Tensor) -> None:
    loss = lm_loss(logits, torch.tensor(IDS), MASK)
    changed = logits.clone()
    changed[:, -1] += 5 * torch.arange(10)
    changed[1, 2:] -= 3 * torch.arange(10)
    assert lm_loss(changed, torch.tensor(IDS), MASK) == loss


@pytest.mark.parametrize("prompt_length", [2, 3])
def test_the_prompt_is_given_and_not_predicted(logits: torch.Tensor, prompt_length: int) -> None:
    loss = lm_loss(logits, torch.tensor(IDS), MASK, prompt_length)
    assert loss.item() == pytest.approx(_slow(logits, IDS, LENGTHS, given=prompt_length), rel=1e-6)


def test_the_sum_is_divided_by_the_tokens_that_were_counted_elsewhere(logits: torch.Tensor) -> None:
    loss = lm_loss(logits, torch.tensor(IDS), MASK, tokens=torch.tensor(12.0))
    assert loss.item() == pytest.approx(_slow(logits, IDS, LENGTHS, given=1) * 6 / 12, rel=1e-6)


@pytest.mark.parametrize("prompt_length", [0, 1])
def test_the_first_token_is_never_predicted(prompt_length: int) -> None:
    assert predicted(MASK, prompt_length).tolist() == [[True] * 4, [True] * 2 + [False] * 2]


def test_the_tokens_after_the_prompt_are_predicted_and_no_padding() -> None:
    assert predicted(MASK, 3).tolist() == [[False, False, True, True], [False] * 4]


def test_the_token_ids_given_are_left_as_they_are(logits: torch.Tensor) -> None:
    ids = torch.tensor(IDS)
    lm_loss(logits, ids, MASK, prompt_length=2)
    assert ids.tolist() == IDS
