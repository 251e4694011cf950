"""ITC, image-text contrastive learning with soft targets from momentum encoders (BLIP, section 3.2; ALBEF, eq. 6)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def itc_loss(
    image: Tensor,
    text: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    momentum_image: Tensor,
    momentum_text: Tensor,
    positives: Tensor,
    temperature: Tensor,
    alpha: float,
) -> Tensor:
    """Half the sum of the image-to-text and the text-to-image cross-entropy against soft targets, a scalar.

    Args:
        image, text: (B, E), unit length, with gradient.
        image_keys, text_keys: (K, E), what is compared with: the batch's momentum embeddings, then the queue's.
        momentum_image, momentum_text: (B, E), of the momentum encoders; their similarities make the soft targets.
        positives: (B, K) bool, True where key k belongs to the same image as row b (at least one a row).
        temperature: one value, a divisor.
        alpha: weight of the soft targets, 0..1.
    """
    hard = positives.float() / positives.sum(dim=1, keepdim=True)
    with torch.no_grad():
        text_targets = _soft_targets(momentum_image, text_keys, hard, temperature, alpha)
        image_targets = _soft_targets(momentum_text, image_keys, hard, temperature, alpha)
    image_to_text = _cross_entropy(image, text_keys, text_targets, temperature)
    text_to_image = _cross_entropy(text, image_keys, image_targets, temperature)
    return (image_to_text + text_to_image) / 2


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines (B, K) of unit vectors (B, E) and (K, E), in float32 whatever the precision around.

    Divided by a temperature of 0.001, half precision would round them to whole numbers, and its softmax overflow.
    """
    with torch.autocast(queries.device.type, enabled=False):
        return queries.float() @ keys.float().T


def _soft_targets(queries: Tensor, keys: Tensor, hard: Tensor, temperature: Tensor, alpha: float) -> Tensor:
    return alpha * F.softmax(cosines(queries, keys) / temperature.float(), dim=1) + (1 - alpha) * hard


def _cross_entropy(queries: Tensor, keys: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    logits = cosines(queries, keys) / temperature.float()
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
