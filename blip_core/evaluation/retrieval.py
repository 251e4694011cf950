"""Recall at k of a matrix of image-text scores (the measure of BLIP's tables 1 and 5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

KS = (1, 5, 10)


def recall_at(scores: Tensor, text_image: Sequence[int], ks: Sequence[int] = KS) -> dict[str, dict[str, float]]:
    """Share of queries whose answer stands among the best k, both ways, 0..1.

    A tie counts against the model: a matrix of equal scores finds nothing. From an image, any of its own texts
    answers; an image without a text is no query.

    Args:
        scores: (I, T), higher is more alike.
        text_image: the image, 0..I-1, of each of the T texts.

    Returns {"image_to_text": {"r1": ..., ...}, "text_to_image": {...}}.
    """
    owner = torch.as_tensor(text_image, device=scores.device)  # (T,)
    columns = torch.arange(len(owner), device=scores.device)
    own = owner[None, :] == torch.arange(scores.shape[0], device=scores.device)[:, None]  # (I, T)
    best_own = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    others = ((scores >= best_own) & ~own).sum(dim=1)
    text_ranks = others[own.any(dim=1)]
    image_ranks = (scores >= scores[owner, columns]).sum(dim=0) - 1
    return {"image_to_text": _recalls(text_ranks, ks), "text_to_image": _recalls(image_ranks, ks)}


def _recalls(ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    return {f"r{k}": (ranks < k).float().mean().item() for k in ks}
