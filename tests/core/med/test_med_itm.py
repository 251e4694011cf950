"""ITM: which negatives are drawn, how often, and what the loss makes of them."""

import math

import pytest
import torch
from torch import Tensor

from blip_core.med.itm import HardNegatives, draw_hard_negatives, itm_loss

ONE = torch.tensor(1.0)
# the largest that torch.rand gives
LAST = 1 - 2**-24


def grid(count: int) -> Tensor:
    """As many equally spaced numbers in [0, 1), twice: chance without chance."""
    return ((torch.arange(count) + 0.5) / count).expand(2, count)


def same_image(ids: list[int], others: list[int]) -> Tensor:
    return torch.tensor(ids)[:, None] == torch.tensor(others)[None, :]


def draws_of_a_row(images: list[float], texts: list[float], same: list[bool], temperature: float) -> HardNegatives:
    """What one row draws over a fine grid: `images` likens its text to images, `texts` its image to texts."""
    count = 20_000
    rows = [torch.tensor([values]).expand(count, -1) for values in (texts, images)]
    likenesses = torch.tensor([same]).expand(count, -1)
    return draw_hard_negatives(*rows, likenesses, torch.tensor(temperature), grid(count))


def frequencies(places: Tensor, count: int) -> list[float]:
    return (torch.bincount(places, minlength=count) / len(places)).tolist()


def expected_frequencies(values: list[float], same: list[bool], temperature: float) -> list[float]:
    """The softmax over all places and a ten-thousandth more, without the same image's."""
    exponentials = [math.exp(value / temperature) for value in values]
    weights = [
        0.0 if own else exponential / sum(exponentials) + 1e-4
        for exponential, own in zip(exponentials, same, strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


def test_a_negative_is_never_of_the_same_image() -> None:
    ids = torch.tensor([5, 6, 5, 7, 6])
    same = ids[:, None] == ids[None, :]
    # the same image's texts are by far the most similar, which must not matter
    similarities = 10.0 * same.float()
    for uniform in (0.0, *torch.linspace(0.001, 0.999, 300).tolist(), LAST):
        uniforms = torch.full((2, 5), uniform)
        negatives = draw_hard_negatives(similarities, similarities, same, torch.tensor(0.01), uniforms)
        assert (ids[negatives.images] != ids).all()
        assert (ids[negatives.texts] != ids).all()
        assert negatives.found.all()


def test_negatives_are_drawn_as_often_as_the_softmax_of_their_similarity_says() -> None:
    images, texts = [0.9, 0.5, 0.1, 0.3, 0.5], [0.2, 0.8, 0.6, 0.1, -0.3]
    # five pairs of all processes, the second one the row's own, the last one of the same image
    same = [False, True, False, False, True]
    negatives = draws_of_a_row(images, texts, same, 0.25)
    for places, values in ((negatives.images, images), (negatives.texts, texts)):
        expected = expected_frequencies(values, same, 0.25)
        assert frequencies(places, 5) == pytest.approx(expected, abs=2 / 20_000)


def test_a_pair_without_any_likeness_can_still_be_drawn() -> None:
    # at 0.001 the softmax leaves the others nothing, the floor a half each of what is left
    negatives = draws_of_a_row([1.0, -1.0, -1.0], [1.0, 0.0, -1.0], [True, False, False], 0.001)
    for places in (negatives.images, negatives.texts):
        assert frequencies(places, 3) == pytest.approx([0.0, 0.5, 0.5], abs=2 / 20_000)


def test_images_are_drawn_by_the_texts_likeness_and_texts_by_the_images() -> None:
    image_to_text = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    text_to_image = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    same = same_image([1, 2], [1, 2, 3])
    negatives = draw_hard_negatives(image_to_text, text_to_image, same, torch.tensor(0.01), torch.full((2, 2), 0.5))
    assert (negatives.images.tolist(), negatives.texts.tolist()) == ([2, 0], [1, 2])


def test_each_draw_has_a_number_of_its_own() -> None:
    similarities = torch.zeros(2, 4)
    same = same_image([1, 2], [1, 2, 3, 4])
    uniforms = torch.tensor([[0.1, 0.5], [0.9, 0.99]])
    negatives = draw_hard_negatives(similarities, similarities, same, ONE, uniforms)
    # three others a row, each a third: 0.1 is in the first one's, 0.5 in the second's, 0.9 and 0.99 in the last one's
    assert (negatives.images.tolist(), negatives.texts.tolist()) == ([1, 2], [3, 3])


def test_a_row_draws_the_same_whatever_is_drawn_beside_it_or_was_drawn_before() -> None:
    generator = torch.Generator().manual_seed(0)
    similarities, uniforms = torch.rand(2, 6, 9, generator=generator), torch.rand(2, 6, generator=generator)
    same = same_image([0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 0, 7, 8, 1])
    whole = draw_hard_negatives(*similarities, same, ONE, uniforms)
    state = torch.get_rng_state()
    for row in range(6):
        own = slice(row, row + 1)
        alone = draw_hard_negatives(*similarities[:, own], same[own], ONE, uniforms[:, own])
        assert [part[own].tolist() for part in whole] == [part.tolist() for part in alone]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loss_is_the_mean_over_one_match_and_two_negatives_a_pair() -> None:
    logits = torch.tensor([[0.0, 2.0], [0.0, -1.0], [3.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # -log of the probability of 'match' for the first two, of 'no match' for the others
    margins = [2.0, -1.0, 3.0, 0.0, 1.0, -1.0]
    expected = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 6
    assert itm_loss(logits, torch.ones(2).bool()).item() == pytest.approx(expected, rel=1e-6)


def test_rows_without_any_other_image_are_left_out_of_the_negatives() -> None:
    same = same_image([3, 4, 3], [3, 3, 3])
    negatives = draw_hard_negatives(torch.zeros(3, 3), torch.zeros(3, 3), same, ONE, torch.full((2, 3), 0.5))
    assert negatives.found.tolist() == [False, True, False]
    assert all(0 <= place < 3 for part in negatives[:2] for place in part.tolist())
    matches, ignored = [[0.0, 2.0], [0.0, -1.0], [0.0, 0.5]], [9.0, -9.0]
    logits = torch.tensor([*matches, ignored, [1.0, 0.0], ignored, ignored, [0.0, 1.0], ignored])
    expected = sum(math.log(1 + math.exp(-margin)) for margin in (2.0, -1.0, 0.5, 1.0, -1.0)) / 5
    assert itm_loss(logits, negatives.found).item() == pytest.approx(expected, rel=1e-6)


def test_the_sum_is_divided_by_the_rows_that_were_counted_elsewhere() -> None:
    logits = torch.tensor([[0.0, 2.0], [0.0, -1.0], [3.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = torch.ones(2).bool()
    assert itm_loss(logits, found, torch.tensor(4.0)).item() == pytest.approx(1.5 * itm_loss(logits, found).item())


def test_drawing_needs_no_gradient_of_the_similarities() -> None:
    similarities, temperature = torch.zeros(3, 3, requires_grad=True), ONE.clone().requires_grad_()
    negatives = draw_hard_negatives(similarities, similarities, torch.eye(3).bool(), temperature, torch.rand(2, 3))
    for part in negatives:
        assert not part.requires_grad
    assert negatives.images.dtype == negatives.texts.dtype == torch.int64
