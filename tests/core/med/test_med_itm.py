"""ITM: which negatives are drawn, how often, and what the loss makes of them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from blip_core.med.itm import HardNegatives, draw_hard_negatives, itm_loss

ONE = torch.tensor(1.0)


def test_a_negative_is_never_of_the_same_image() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([5, 6, 5, 7, 6])
    # the same image's texts are by far the most similar, which must not matter
    similarities = 10.0 * (ids[:, None] == ids[None, :]).float()
    for _ in range(300):
        negatives = draw_hard_negatives(similarities, ids, torch.tensor(0.01))
        assert (ids[negatives.images] != ids).all()
        assert (ids[negatives.texts] != ids).all()


def test_negatives_are_drawn_as_often_as_the_softmax_of_their_similarity_says() -> None:
    torch.manual_seed(0)
    similarities = torch.tensor(
        [[0.9, 0.5, 0.1, 0.3], [0.2, 0.8, 0.6, 0.1], [0.0, 0.3, 0.7, 0.4], [0.5, 0.1, 0.2, 0.6]]
    )
    temperature, draws = 0.25, 4000
    texts, images = np.zeros((4, 4)), np.zeros((4, 4))
    for _ in range(draws):
        negatives = draw_hard_negatives(similarities, torch.arange(4), torch.tensor(temperature))
        texts[np.arange(4), negatives.texts.numpy()] += 1
        images[np.arange(4), negatives.images.numpy()] += 1
    exact = similarities.double().numpy()
    for counts, logits in ((texts, exact), (images, exact.T)):
        weights = np.exp(logits / temperature)
        weights = weights / weights.sum(axis=1, keepdims=True) + 1e-4
        for row in range(4):
            others = [place for place in range(4) if place != row]
            expected = weights[row, others] / weights[row, others].sum() * draws
            assert counts[row, row] == 0
            assert chisquare(counts[row, others], expected).pvalue > 1e-3


def test_a_pair_without_any_likeness_can_still_be_drawn() -> None:
    torch.manual_seed(0)
    similarities = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    negatives = draw_hard_negatives(similarities, torch.arange(2), torch.tensor(0.001))
    assert (negatives.images.tolist(), negatives.texts.tolist()) == ([1, 0], [1, 0])


def test_the_loss_is_the_mean_over_one_match_and_two_negatives_a_pair() -> None:
    logits = torch.tensor([[0.0, 2.0], [0.0, -1.0], [3.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    negatives = HardNegatives(torch.tensor([1, 0]), torch.tensor([1, 0]))
    # -log of the probability of 'match' for the first two, of 'no match' for the others
    margins = [2.0, -1.0, 3.0, 0.0, 1.0, -1.0]
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 6
    assert itm_loss(logits, torch.tensor([1, 2]), negatives).item() == pytest.approx(expected, rel=1e-6)


def test_rows_without_any_other_image_are_left_out_of_the_negatives() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([3, 3])
    negatives = draw_hard_negatives(torch.zeros(2, 2), ids, ONE)
    assert (negatives.images.tolist(), negatives.texts.tolist()) == ([0, 1], [0, 1])
    logits = torch.tensor([[0.0, 2.0], [0.0, -1.0], *[[9.0, -9.0]] * 2, *[[-9.0, 9.0]] * 2])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert itm_loss(logits, ids, negatives).item() == pytest.approx(expected, rel=1e-6)


def test_drawing_needs_no_gradient_of_the_similarities() -> None:
    similarities = torch.zeros(3, 3, requires_grad=True)
    negatives = draw_hard_negatives(similarities, torch.arange(3), ONE.clone().requires_grad_())
    assert negatives.images.dtype == torch.int64
    assert not negatives.images.requires_grad
