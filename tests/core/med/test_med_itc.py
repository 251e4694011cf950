"""ITC against values worked out by hand and against the definition written as loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from blip_core.med.itc import itc_loss

ONE = torch.tensor(1.0)


def _slow(image, text, image_keys, text_keys, momentum_image, momentum_text, positives, temperature, alpha) -> float:  # noqa: ANN001
    """ALBEF, equation 6, one number at a time."""

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    def softmax(values: list[float]) -> list[float]:
        exponentials = [math.exp(value - max(values)) for value in values]
        return [exponential / sum(exponentials) for exponential in exponentials]

    def one_way(queries: list, keys: list, teachers: list) -> float:
        total = 0.0
        for row, (query, teacher) in enumerate(zip(queries, teachers, strict=True)):
            predicted = softmax([dot(query, key) / temperature for key in keys])
            soft = softmax([dot(teacher, key) / temperature for key in keys])
            share = 1 / sum(positives[row])
            for place in range(len(keys)):
                target = alpha * soft[place] + (1 - alpha) * (share if positives[row][place] else 0.0)
                total -= target * math.log(predicted[place])
        return total / len(queries)

    return (one_way(image, text_keys, momentum_image) + one_way(text, image_keys, momentum_text)) / 2


def _unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_two_orthogonal_pairs_give_the_value_of_the_formula() -> None:
    eye = torch.eye(2)
    # the right text has logit 1, the wrong one 0: -log(e / (e + 1)) = log(1 + 1/e)
    assert itc_loss(eye, eye, eye, eye, eye, eye, eye.bool(), ONE, 0.0).item() == pytest.approx(0.3132617)
    # half of the target is the softmax (0.7310586, 0.2689414): 0.8655293 * 0.3132617 + 0.1344707 * 1.3132617
    assert itc_loss(eye, eye, eye, eye, eye, eye, eye.bool(), ONE, 0.5).item() == pytest.approx(0.4477324)


def test_the_two_directions_are_averaged() -> None:
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    text = torch.eye(2)
    # image to text: logits (1, 0) in both rows, positives on the diagonal: (0.3132617 + 1.3132617) / 2
    # text to image: logits (1, 1) and (0, 0): log 2 in both rows
    expected = ((0.3132617 + 1.3132617) / 2 + math.log(2)) / 2
    loss = itc_loss(image, text, image, text, image, text, torch.eye(2).bool(), ONE, 0.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_queue_keys_and_several_captions_of_an_image_count_as_the_definition_says(alpha: float) -> None:
    image, text = _unit(3, 1), _unit(3, 2)
    momentum_image, momentum_text = _unit(3, 3), _unit(3, 4)
    image_keys = torch.cat([momentum_image, _unit(4, 5)])
    text_keys = torch.cat([momentum_text, _unit(4, 6)])
    # rows 0 and 2 show one image, of which the queue's second entry is an older caption
    ids, known = torch.tensor([7, 8, 7]), torch.tensor([7, 8, 7, -1, 7, 9, -1])
    positives = ids[:, None] == known[None, :]
    assert positives.sum(dim=1).tolist() == [3, 1, 3]
    arguments = (image, text, image_keys, text_keys, momentum_image, momentum_text, positives)
    loss = itc_loss(*arguments, torch.tensor(0.2), alpha)
    assert loss.item() == pytest.approx(_slow(*(part.tolist() for part in arguments), 0.2, alpha), rel=1e-5)


def test_the_soft_targets_send_no_gradient_and_the_embeddings_do() -> None:
    image, text, temperature = _unit(3, 1).requires_grad_(), _unit(3, 2).requires_grad_(), ONE.clone().requires_grad_()
    teacher = _unit(3, 3).requires_grad_()
    itc_loss(image, text, _unit(3, 4), _unit(3, 5), teacher, teacher, torch.eye(3).bool(), temperature, 0.4).backward()
    assert teacher.grad is None
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in (image, text, temperature))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_the_lowest_temperature_stays_finite_and_right(dtype: torch.dtype) -> None:
    parts = [_unit(4, seed).to(dtype) for seed in range(6)]
    cold, positives = torch.tensor(0.001), torch.eye(4).bool()
    loss = itc_loss(*parts, positives, cold, 0.4)
    assert loss.item() == pytest.approx(
        itc_loss(*(part.double().float() for part in parts), positives, cold, 0.4).item()
    )
    assert torch.isfinite(loss)


def test_mixed_precision_compares_in_float32() -> None:
    parts = [_unit(4, seed) for seed in range(6)]
    arguments = (*parts, torch.eye(4).bool(), torch.tensor(0.001), 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = itc_loss(*arguments)
    assert mixed.item() == pytest.approx(itc_loss(*arguments).item(), rel=1e-5)
