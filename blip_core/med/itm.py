"""ITM, image-text matching, with hard negatives drawn by the ITC similarities (BLIP, section 3.2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Keeps every non-matching pair possible, as the official code does.
FLOOR = 1e-4


class HardNegatives(NamedTuple):
    """For each text an image that does not belong to it, and for each image such a text; (B,) int64 each."""

    images: Tensor
    texts: Tensor


def draw_hard_negatives(similarities: Tensor, image_ids: Tensor, temperature: Tensor) -> HardNegatives:
    """Draws one negative a row with probability rising with similarity; never a pair of the same image.

    Args:
        similarities: (B, B) cosine of image i (rows) and text j (columns).
        image_ids: (B,) int64; equal ids are the same image.
        temperature: scalar, the ITC's.

    A row all of whose others are the same image draws itself, which `itm_loss` leaves out.
    """
    same = image_ids[:, None] == image_ids[None, :]
    logits = similarities.detach().float() / temperature.detach().float()
    texts = torch.multinomial(_weights(logits, same), 1).squeeze(1)
    images = torch.multinomial(_weights(logits.T, same), 1).squeeze(1)
    return HardNegatives(images, texts)


def _weights(logits: Tensor, same: Tensor) -> Tensor:
    weights = (F.softmax(logits, dim=1) + FLOOR).masked_fill(same, 0.0)
    lonely = same.all(dim=1)
    weights[lonely, lonely.nonzero().squeeze(1)] = 1.0
    return weights


def itm_loss(logits: Tensor, image_ids: Tensor, negatives: HardNegatives) -> Tensor:
    """Mean cross-entropy over B matched pairs and up to 2B negatives, a scalar.

    Args:
        logits: (3B, 2): the B pairs, then (text, negative image), then (negative text, image).
        image_ids: (B,) int64.
        negatives: what was drawn; a negative that is the same image after all is left out.
    """
    batch = image_ids.shape[0]
    labels = torch.zeros(3 * batch, dtype=torch.long, device=logits.device)
    labels[:batch] = 1
    labels[batch : 2 * batch].masked_fill_(image_ids[negatives.images] == image_ids, -100)
    labels[2 * batch :].masked_fill_(image_ids[negatives.texts] == image_ids, -100)
    return F.cross_entropy(logits.float(), labels, ignore_index=-100)
