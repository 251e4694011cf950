"""ITM, image-text matching, with hard negatives drawn by the ITC similarities (BLIP, section 3.2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Keeps every non-matching pair possible, as the official code does.
FLOOR = 1e-4


class HardNegatives(NamedTuple):
    """For each text an image that does not belong to it, and for each image such a text.

    Attributes:
        images, texts: (B,) int64, places among the K pairs that they were drawn from.
        found: (B,) bool, False where all of the K pairs have the row's own image; the places then mean nothing.
    """

    images: Tensor
    texts: Tensor
    found: Tensor


def draw_hard_negatives(
    image_to_text: Tensor, text_to_image: Tensor, same: Tensor, temperature: Tensor, uniforms: Tensor
) -> HardNegatives:
    """Draws one negative a row with probability rising with similarity; never a pair of the same image.

    Args:
        image_to_text, text_to_image: (B, K) cosines of the rows' images with K texts, and of their texts with K images.
        same: (B, K) bool, True where pair k has the same image as row b.
        temperature: one value, the ITC's.
        uniforms: (2, B) in [0, 1), the chance of the images' and of the texts' draw. Being given, it makes a row's
            negative the same in whichever process it is drawn.
    """
    images = _draw(text_to_image, same, temperature, uniforms[0])
    texts = _draw(image_to_text, same, temperature, uniforms[1])
    return HardNegatives(images, texts, ~same.all(dim=1))


def _draw(similarities: Tensor, same: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    # float64: a sum of thousands of weights in float32 would decide a draw by its order
    logits = similarities.detach().double() / temperature.detach().double()
    weights = (F.softmax(logits, dim=1) + FLOOR).masked_fill(same, 0.0)
    cumulated = weights.cumsum(dim=1)
    wanted = uniforms.double()[:, None] * cumulated[:, -1:]
    # the last place that can be drawn, where rounding puts a number on the very end
    last = weights.shape[1] - 1 - (weights > 0).flip(1).int().argmax(dim=1, keepdim=True)
    return torch.searchsorted(cumulated, wanted, right=True).minimum(last).squeeze(1)


def itm_loss(logits: Tensor, found: Tensor, pairs: Tensor | None = None) -> Tensor:
    """Cross-entropy over B matched pairs and their negatives, a scalar.

    Args:
        logits: (3B, 2): the B pairs, then (negative image, text), then (image, negative text).
        found: (B,) bool; a row that found no negative counts as a pair alone.
        pairs: what the sum is divided by; None for the number of rows that count.
    """
    labels = torch.cat([torch.ones_like(found), torch.zeros_like(found), torch.zeros_like(found)]).long()
    counted = torch.cat([torch.ones_like(found), found, found])
    total = F.cross_entropy(logits.float(), labels.masked_fill(~counted, -100), ignore_index=-100, reduction="sum")
    return total / (counted.sum() if pairs is None else pairs)
