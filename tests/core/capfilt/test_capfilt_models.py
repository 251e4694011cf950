"""Captioner and Filter over batches: what one image or text gets does not depend on what stands beside it."""

import itertools
from dataclasses import replace

import pytest
import torch

from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import IMAGES_AT_ONCE, Filter
from blip_core.med.decoding import GenerationConfig
from blip_core.med.inference import Precision

TEXTS = ["a star", "a red circle under a blue square", "two green rings under a red star", "a circle"]


@pytest.fixture
def images(models: tuple[Captioner, Filter]) -> torch.Tensor:
    torch.manual_seed(0)
    size = models[1].med.image_size
    return torch.randn(2 * IMAGES_AT_ONCE + 3, 3, size, size)


@pytest.mark.parametrize("most", [1, 4])
def test_the_filter_judges_a_batch_as_each_pair_alone(
    most: int, models: tuple[Captioner, Filter], images: torch.Tensor
) -> None:
    filter = models[1]
    texts = [[TEXTS[(row + place) % 4] for place in range(1 + row % most)] for row in range(len(images))]
    together = filter.score(images, texts)
    assert [len(row) for row in together] == [len(row) for row in texts]
    for row, scores in enumerate(together):
        for place, score in enumerate(scores):
            [[alone]] = filter.score(images[row : row + 1], [[texts[row][place]]])
            assert score.itm == pytest.approx(alone.itm, abs=1e-5)
            assert score.itc == pytest.approx(alone.itc, abs=1e-5)


def test_images_without_a_text_stay_in_their_place(models: tuple[Captioner, Filter], images: torch.Tensor) -> None:
    texts = [[] if row % 3 else ["a star"] for row in range(len(images))]
    found = models[1].score(images, texts)
    assert [len(row) for row in found] == [len(row) for row in texts]
    [[last]] = models[1].score(images[18:19], [["a star"]])
    assert found[18][0].itm == pytest.approx(last.itm, abs=1e-5)


def test_decoding_in_fixed_shapes_writes_the_same_captions(models: tuple[Captioner, Filter]) -> None:
    torch.manual_seed(0)
    captioner, config = models[0], GenerationConfig(max_length=8, top_k=20)
    images = torch.randn(5, 3, captioner.med.image_size, captioner.med.image_size)
    seeds = [[10 * row + place for place in range(3)] for row in range(5)]
    expected = captioner.caption(images, config, seeds)
    found = replace(captioner, static=True).caption(images, config, seeds)
    assert [[text for text, _ in row] for row in found] == [[text for text, _ in row] for row in expected]
    assert len({text for row in found for text, _ in row}) > 5
    # a smaller batch afterwards, as the last one of a shard is
    few = replace(captioner, static=True).caption(images[:2], config, seeds[:2])
    assert [[text for text, _ in row] for row in few] == [[text for text, _ in row] for row in expected[:2]]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_both_models_load_in_every_precision(
    precision: Precision, checkpoints: tuple[str, str], models: tuple[Captioner, Filter]
) -> None:
    captioner = Captioner.load(checkpoints[0], precision=precision)
    filter = Filter.load(checkpoints[1], precision=precision)
    assert (captioner.digest, filter.digest) == (models[0].digest, models[1].digest)
    torch.manual_seed(0)
    images = torch.randn(3, 3, 24, 24)
    texts = [["a star", "a blue square"]] * 3
    rough, exact = filter.score(images, texts), models[1].score(images, texts)
    for one, other in zip(itertools.chain(*rough), itertools.chain(*exact), strict=True):
        assert one.itm == pytest.approx(other.itm, abs=0.05)
    size = captioner.med.image_size
    captions = captioner.caption(torch.randn(2, 3, size, size), GenerationConfig(max_length=6), [[1, 2], [3, 4]])
    assert all(text and logprob < 0 for row in captions for text, logprob in row)
