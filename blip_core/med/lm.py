"""LM, language modeling of the text given the image, with label smoothing (BLIP, section 3.2)."""

import torch.nn.functional as F
from torch import Tensor

LABEL_SMOOTHING = 0.1


def lm_loss(logits: Tensor, ids: Tensor, mask: Tensor, prompt_length: int = 0) -> Tensor:
    """Mean cross-entropy of each token given those before it, a scalar.

    Args:
        logits: (B, L, V); place i predicts token i + 1.
        ids: (B, L) int64.
        mask: (B, L) bool; padding is not predicted.
        prompt_length: leading tokens that are given, not predicted, [DEC] counted.
    """
    targets = ids.masked_fill(~mask, -100)[:, 1:].clone()
    if prompt_length > 1:
        targets[:, : prompt_length - 1] = -100
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=LABEL_SMOOTHING
    )
