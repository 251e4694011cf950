"""Values and gradients of ITC, ITM and LM against the papers' formulas, written as loops over single numbers.

The loops compute in float64 and leave the derivative to autograd. BLIP names its objectives (section 3.2) and leaves
their formulas to ALBEF: equations 1, 2 and 6 for ITC, 4 for ITM.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from blip_core.med.itc import cosines, itc_loss
from blip_core.med.itm import draw_hard_negatives, itm_loss
from blip_core.med.lm import lm_loss
from blip_core.med.med import TEMPERATURE_RANGE

COLDEST, HOTTEST = TEMPERATURE_RANGE
varied = settings(deadline=None, derandomize=True, database=None, max_examples=100)

seeds = st.integers(0, 2**32 - 1)
temperatures = st.sampled_from([COLDEST, 0.07, HOTTEST]) | st.floats(COLDEST, HOTTEST)
alphas = st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0)
# few images, so that some come twice in a batch and again in the queue, and some batches have but one
image_ids = st.lists(st.integers(0, 2), min_size=1, max_size=4)
queued_ids = st.lists(st.integers(-1, 3), max_size=5)


def softmax(values: Sequence[Tensor]) -> list[Tensor]:
    highest = max(value.item() for value in values)
    exponentials = [(value - highest).exp() for value in values]
    return [exponential / sum(exponentials) for exponential in exponentials]


def log_softmax(values: Sequence[Tensor]) -> list[Tensor]:
    highest = max(value.item() for value in values)
    normaliser = highest + sum((value - highest).exp() for value in values).log()
    return [value - normaliser for value in values]


def dot(one: Tensor, other: Tensor) -> Tensor:
    return sum(x * y for x, y in zip(one, other, strict=True))


def cross_entropy(targets: Sequence[Any], logits: Sequence[Tensor]) -> Tensor:
    """H(targets, softmax(logits))."""
    return -sum(target * log for target, log in zip(targets, log_softmax(logits), strict=True))


def check(
    ours: Callable[..., Tensor],
    slow: Callable[..., Tensor],
    parts: Sequence[Tensor],
    tolerance: float = 1e-5,
    rounding: float = 0.0,
) -> None:
    """Both give the same value and, within the tolerance of its largest number, the same gradient of each part.

    Args:
        parts: float32, what the gradients are of.
        rounding: of the gradients' own precision.
    """
    fast = [part.clone().requires_grad_() for part in parts]
    exact = [part.double().requires_grad_() for part in parts]
    value, expected = ours(*fast), slow(*exact)
    assert value.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    value.backward()
    expected.backward()
    for one, other in zip(fast, exact, strict=True):
        allowed = (tolerance + rounding) * max(1.0, other.grad.abs().max().item())
        assert (one.grad - other.grad).abs().max() <= allowed


def at(temperature: float) -> float:
    """The tolerance of what a temperature divides: a cosine's rounding error is divided as well."""
    return 1e-5 * max(1.0, 0.07 / temperature)


class Contrast(NamedTuple):
    """Arguments of ITC: B rows of a batch, K keys, of which the batch's are the first."""

    image: Tensor
    text: Tensor
    image_keys: Tensor
    text_keys: Tensor
    momentum_image: Tensor
    momentum_text: Tensor
    positives: Tensor


def contrast(seed: int, ids: list[int], queued: list[int], width: int) -> Contrast:
    generator = torch.Generator().manual_seed(seed)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=generator), dim=1)

    image, text, momentum_image, momentum_text = (unit(len(ids)) for _ in range(4))
    image_keys, text_keys = (torch.cat([own, unit(len(queued))]) for own in (momentum_image, momentum_text))
    positives = torch.tensor(ids)[:, None] == torch.tensor(ids + queued)[None, :]
    return Contrast(image, text, image_keys, text_keys, momentum_image, momentum_text, positives)


def slow_itc(image: Tensor, text: Tensor, temperature: Tensor, of: Contrast, alpha: float) -> Tensor:
    """ALBEF's equation 2 with equation 1's softmax and equation 6's targets: (1 - alpha) y + alpha q.

    With cross-entropy where equation 6 has the divergence, as in the official code: they differ by q's entropy, which
    has no gradient. The targets' temperature has none either. An image with several texts has as many ones in y,
    which then share the row.
    """
    total = 0 * image.sum()
    directions = (
        (image, of.text_keys, of.momentum_image),
        (text, of.image_keys, of.momentum_text),
    )
    for queries, keys, teachers in directions:
        keys, teachers = keys.double(), teachers.double()
        for row in range(len(queries)):
            soft = softmax([dot(teachers[row], key) / temperature.item() for key in keys])
            right = of.positives[row].tolist()
            targets = [
                (1 - alpha) * (1 / sum(right) if is_right else 0.0) + alpha * share
                for is_right, share in zip(right, soft, strict=True)
            ]
            logits = [dot(queries[row], key) / temperature for key in keys]
            total = total + cross_entropy(targets, logits) / len(queries) / 2
    return total


@varied
@given(seeds, image_ids, queued_ids, st.integers(1, 5), temperatures, alphas)
def test_itc_and_its_gradients_are_those_of_the_formula(
    seed: int, ids: list[int], queued: list[int], width: int, temperature: float, alpha: float
) -> None:
    of = contrast(seed, ids, queued, width)

    divisor = torch.tensor(temperature)

    def ours(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
        return itc_loss(image, text, *of[2:], factor * divisor, alpha)

    def slow(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
        return slow_itc(image, text, factor * divisor.double(), of, alpha)

    # the temperature's gradient by a factor of it, so that it is of the size of the others
    check(ours, slow, [of.image, of.text, torch.ones(())], at(temperature))


@varied
@given(seeds, image_ids, queued_ids, st.sampled_from([torch.float16, torch.bfloat16]), alphas)
def test_itc_at_the_coldest_is_finite_and_right_in_half_precision(
    seed: int, ids: list[int], queued: list[int], dtype: torch.dtype, alpha: float
) -> None:
    whole = contrast(seed, ids, queued, 4)
    halves = Contrast(*(part.to(dtype) for part in whole[:-1]), whole.positives)

    divisor = torch.tensor(COLDEST)

    def ours(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return itc_loss(image.to(dtype), text.to(dtype), *halves[2:], factor * divisor, alpha)

    def slow(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
        return slow_itc(image, text, factor * divisor.double(), halves, alpha)

    # the gradient is rounded to the embedding's precision on its way back
    parts = [halves.image.float(), halves.text.float(), torch.ones(())]
    check(ours, slow, parts, at(COLDEST), torch.finfo(dtype).eps)


def slow_draw(likenesses: list[float], same: list[bool], temperature: float, uniform: float) -> int | None:
    """The first place at which the summed weights pass the uniform share of them all; None where all weigh nothing."""
    exponentials = [math.exp((value - max(likenesses)) / temperature) for value in likenesses]
    weights = [
        0.0 if own else exponential / sum(exponentials) + 1e-4
        for exponential, own in zip(exponentials, same, strict=True)
    ]
    passed = 0.0
    for place, weight in enumerate(weights):
        passed += weight
        if passed > uniform * sum(weights):
            return place
    return None


@varied
@given(seeds, image_ids, queued_ids, temperatures, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_hard_negatives_are_those_of_the_definition(
    seed: int, ids: list[int], others: list[int], temperature: float, dtype: torch.dtype
) -> None:
    of = contrast(seed, ids, others, 4)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        similarities = [
            cosines(*(part.to(dtype) for part in pair)) for pair in ((of.image, of.text_keys), (of.text, of.image_keys))
        ]
    uniforms = torch.rand(2, len(ids), generator=torch.Generator().manual_seed(seed))
    divisor = torch.tensor(temperature)
    negatives = draw_hard_negatives(*similarities, of.positives, divisor, uniforms)
    drawn = zip(negatives.images.tolist(), negatives.texts.tolist(), negatives.found.tolist(), strict=True)
    for row, (image, text, found) in enumerate(drawn):
        same = of.positives[row].tolist()
        image_to_text, text_to_image = (part[row].tolist() for part in similarities)
        expected = [
            slow_draw(text_to_image, same, divisor.item(), uniforms[0, row].item()),
            slow_draw(image_to_text, same, divisor.item(), uniforms[1, row].item()),
        ]
        assert found == (not all(same))
        assert ([image, text] if found else [None, None]) == expected


def slow_itm(logits: Tensor, found: list[bool], pairs: float | None) -> Tensor:
    """ALBEF's equation 4: cross-entropy of 'match' for the pairs, of 'no match' for the negatives that there are."""
    rows = len(found)
    losses = [cross_entropy([0.0, 1.0], logits[row]) for row in range(rows)]
    for row in range(rows):
        if found[row]:
            losses.append(cross_entropy([1.0, 0.0], logits[rows + row]))
            losses.append(cross_entropy([1.0, 0.0], logits[2 * rows + row]))
    return sum(losses) / (len(losses) if pairs is None else pairs)


@varied
@given(
    seeds,
    st.lists(st.booleans(), min_size=1, max_size=6),
    st.none() | st.integers(1, 40),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_itm_and_its_gradient_are_those_of_the_formula(
    seed: int, found: list[bool], pairs: int | None, scale: float
) -> None:
    logits = scale * torch.randn(3 * len(found), 2, generator=torch.Generator().manual_seed(seed))
    divisor = None if pairs is None else torch.tensor(pairs)
    check(
        lambda part: itm_loss(part, torch.tensor(found), divisor),
        lambda part: slow_itm(part, found, pairs),
        [logits],
    )


class Texts(NamedTuple):
    """B texts of up to L tokens of V words; each of its own length, the rest padding."""

    lengths: list[int]
    vocabulary: int
    prompt_length: int

    @property
    def predicted(self) -> int:
        return sum(max(0, length - max(1, self.prompt_length)) for length in self.lengths)


texts = st.builds(Texts, st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(2, 12), st.integers(0, 5))


def slow_lm(logits: Tensor, ids: list[list[int]], of: Texts, tokens: float | None) -> Tensor:
    """Cross-entropy of each token after prompt and first, given those before it; a tenth of it over all words alike."""
    total = 0 * logits.sum()
    for row, length in enumerate(of.lengths):
        for place in range(max(1, of.prompt_length), length):
            targets = [0.1 / of.vocabulary] * of.vocabulary
            targets[ids[row][place]] += 0.9
            total = total + cross_entropy(targets, logits[row][place - 1])
    return total / (of.predicted if tokens is None else tokens)


@varied
@given(seeds, texts, st.none() | st.integers(1, 40), st.sampled_from([0.1, 1.0, 30.0]))
def test_lm_and_its_gradient_are_those_of_the_formula(seed: int, of: Texts, tokens: int | None, scale: float) -> None:
    assume(of.predicted or tokens)
    generator = torch.Generator().manual_seed(seed)
    longest = max(of.lengths)
    logits = scale * torch.randn(len(of.lengths), longest, of.vocabulary, generator=generator)
    ids = torch.randint(of.vocabulary, (len(of.lengths), longest), generator=generator)
    mask = torch.arange(longest) < torch.tensor(of.lengths)[:, None]
    divisor = None if tokens is None else torch.tensor(tokens)
    check(
        lambda part: lm_loss(part, ids, mask, of.prompt_length, divisor),
        lambda part: slow_lm(part, ids.tolist(), of, tokens),
        [logits],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_itm_and_lm_are_finite_at_the_largest_logits_of_half_precision(dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, 1e30)
    logits = torch.tensor([[largest, -largest], [-largest, largest], [largest, -largest]], dtype=dtype)
    logits.requires_grad_()
    with torch.autocast("cpu", dtype):
        # the pair and a negative are wrong by twice the largest
        itm = itm_loss(logits, torch.ones(1).bool())
        lm = lm_loss(logits[None], torch.tensor([[0, 1, 1]]), torch.ones(1, 3).bool())
    assert itm.item() == pytest.approx(4 * logits[0, 0].item() / 3, rel=1e-5)
    # one token is right, one wrong, each with a twentieth on the other word
    assert lm.item() == pytest.approx(logits[0, 0].item(), rel=1e-5)
    (itm + lm).backward()
    assert torch.isfinite(logits.grad).all()
