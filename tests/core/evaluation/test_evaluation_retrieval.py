"""Recall against a slow loop over every query."""

import pytest
import torch

from blip_core.evaluation.retrieval import recall_at


def slow_recall(scores: list[list[float]], text_image: list[int], k: int) -> tuple[float, float]:
    """Recall by sorting each query's answers, right ones last among equals."""
    from_images, from_texts = [], []
    for image, row in enumerate(scores):
        if image in text_image:
            order = sorted(range(len(row)), key=lambda text: (-row[text], text_image[text] == image))
            from_images.append(any(text_image[text] == image for text in order[:k]))
    for text, owner in enumerate(text_image):
        column = [row[text] for row in scores]
        order = sorted(range(len(column)), key=lambda image: (-column[image], image == owner))
        from_texts.append(owner in order[:k])
    return sum(from_images) / len(from_images), sum(from_texts) / len(from_texts)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [3, 1000])
def test_recall_is_that_of_a_slow_loop_with_and_without_ties(seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    text_image = [0, 0, 1, 2, 2, 2, 3, 5, 6, 7, 8, 8, 9, 10, 11]  # image 4 has no text
    scores = torch.randint(levels, (12, len(text_image)), generator=generator).float()
    found = recall_at(scores, text_image, ks=(1, 2, 5))
    for k in (1, 2, 5):
        from_image, from_text = slow_recall(scores.tolist(), text_image, k)
        assert found["image_to_text"][f"r{k}"] == pytest.approx(from_image)
        assert found["text_to_image"][f"r{k}"] == pytest.approx(from_text)


def test_perfect_and_inverted_scores() -> None:
    text_image = list(range(20))
    perfect = recall_at(torch.eye(20), text_image)
    assert set(perfect["image_to_text"].values()) == set(perfect["text_to_image"].values()) == {1.0}
    inverted = recall_at(-torch.eye(20), text_image)
    assert set(inverted["image_to_text"].values()) == set(inverted["text_to_image"].values()) == {0.0}


def test_equal_scores_find_nothing() -> None:
    found = recall_at(torch.zeros(12, 12), list(range(12)))
    assert set(found["image_to_text"].values()) == set(found["text_to_image"].values()) == {0.0}
