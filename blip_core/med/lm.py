"""LM, language modeling of the text given the image, with label smoothing (BLIP, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

LABEL_SMOOTHING = 0.1


def predicted(mask: Tensor, prompt_length: int = 0) -> Tensor:
    """Which tokens (B, L - 1), from the second on, LM predicts.

    Args:
        mask: (B, L) bool; padding is not predicted.
        prompt_length: leading tokens that are given, not predicted, [DEC] counted.
    """
    places = torch.arange(1, mask.shape[1], device=mask.device)
    return mask[:, 1:] & (places >= prompt_length)


def lm_loss(logits: Tensor, ids: Tensor, mask: Tensor, prompt_length: int = 0, tokens: Tensor | None = None) -> Tensor:
    """Cross-entropy of each token given those before it, a scalar.

    Args:
        logits: (B, L, V); place i predicts token i + 1.
        ids: (B, L) int64.
        mask, prompt_length: which of them are predicted, as in `predicted`.
        tokens: what the sum is divided by, at least 1; None for the number of tokens predicted here.
    """
    counted = predicted(mask, prompt_length)
    # the last place has nothing to predict; cutting it off would copy all logits, and their gradients
    targets = F.pad(ids[:, 1:].masked_fill(~counted, -100), (0, 1), value=-100)
    total = F.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=-100,
        label_smoothing=LABEL_SMOOTHING,
        reduction="sum",
    )
    return total / (counted.sum() if tokens is None else tokens).clamp(min=1)
