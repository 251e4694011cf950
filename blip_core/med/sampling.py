"""Nucleus sampling (Holtzman et al., ICLR 2020): which tokens may be sampled, and the draw.

What may be sampled are the tokens whose scores reach a row's threshold. A CPU finds it by sorting the scores, an
accelerator bit by bit from masses alone: nothing there waits for the host, and no shape depends on the scores, so that
it can be part of a CUDA graph. The draw inverts the distribution in the order of token ids, in which rounding swaps no
two tokens.
"""

import numpy as np
import torch
from torch import Tensor

from blip_core.med.decoding import GenerationConfig

HEAD = 256  # so many tokens hold the mass p of most rows; the whole vocabulary is sorted for the others alone
DIGIT_BITS = 2  # of a threshold, found at once


def nucleus(scores: Tensor, uniforms: Tensor, config: GenerationConfig, by_search: bool | None = None) -> Tensor:
    """One token a row (R,) of those that may be sampled, where the row's uniform number (R,) falls among them.

    Args:
        scores: (R, V) float32, logits as `restrict` leaves them.
        uniforms: (R,) in [0, 1).
        config: p, temperature and top_k of it.
        by_search: how thresholds are found, as in `sampled_from`.
    """
    if _searches(scores, by_search) or not 0 < config.top_k < scores.shape[1]:
        return _draw(sampled_from(scores, config, by_search), uniforms).squeeze(1)
    # a CPU has much less to do where the others are left out at once
    tokens = _most_probable(scores, config.top_k)
    places = _draw(sampled_from(scores.gather(1, tokens), config, by_search), uniforms)
    return tokens.gather(1, places).squeeze(1)


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The places (R, 1) where the uniform numbers (R,) fall among the weights (R, V)."""
    cumulated = weights.cumsum(dim=-1)
    total = cumulated[:, -1:].contiguous()
    wanted = uniforms.to(cumulated.dtype)[:, None] * total
    places = torch.searchsorted(cumulated, wanted, right=True)
    # a number just below one can be rounded up to the whole mass, which the last token reaches first
    return places.minimum(torch.searchsorted(cumulated, total))


def _most_probable(scores: Tensor, top_k: int) -> Tensor:
    """Tokens (R, K) in the order of their ids: each row's `top_k` most probable and those equal to the last."""
    least = scores.topk(top_k, dim=-1).values[:, -1:]
    widest = int((scores >= least).sum(dim=-1).max())
    return scores.topk(widest, dim=-1).indices.sort(dim=-1).values


def _searches(scores: Tensor, by_search: bool | None) -> bool:
    return scores.device.type != "cpu" if by_search is None else by_search


def sampled_from(scores: Tensor, config: GenerationConfig, by_search: bool | None = None) -> Tensor:
    """Weights (R, V) float64, proportional to the probabilities of the tokens that may be sampled; others have zero.

    These are the smallest set of tokens with probability p among the `top_k` most probable, of equally probable ones
    the first by id. Temperature, top_k and p act in this order, p on what top_k leaves.

    Args:
        scores: (R, V) float32.
        by_search: whether thresholds are found bit by bit instead of by sorting; None: where scores are not on a CPU.
    """
    by_search = _searches(scores, by_search)
    few = 0 < config.top_k < scores.shape[1]
    if few:
        best = scores.topk(config.top_k, dim=-1).values if by_search else _falling(scores, config.top_k)
        scores = scores.masked_fill(scores < best[:, -1:], -torch.inf)
    weights = scores.double()
    weights = weights.sub_(weights.amax(dim=-1, keepdim=True)).div_(config.temperature).exp_()
    if config.p == 1.0:
        return weights
    mass = config.p * weights.sum(dim=-1, keepdim=True)
    if by_search:
        return _reaching(weights, mass, _least_by_search(scores, weights, mass))
    # most weights are zero where few tokens may be sampled, and equal values are slow to partition
    return _reaching(weights, mass, _least_by_sorting(weights, mass, scores.shape[1] if few else HEAD))


def _reaching(weights: Tensor, mass: Tensor, least: Tensor) -> Tensor:
    """The weights above the threshold `least` (R, 1), and of those equal to it as many as `mass` (R, 1) needs."""
    above, equal = weights > least, weights == least
    missing = mass - weights.where(above, 0.0).sum(dim=-1, keepdim=True)
    needed = (missing / least).ceil().clamp(max=weights.shape[1]).int()  # how many of the equal ones, the first by id
    return weights.where(above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= needed)), 0.0)


def _least_by_sorting(weights: Tensor, mass: Tensor, head: int) -> Tensor:
    """Each row's threshold (R, 1): the greatest weight that so many tokens reach that together they make up `mass`.

    The `head` greatest weights are tried first.
    """
    falling = _falling(weights, head)
    cumulated = falling.cumsum(dim=-1)
    if (cumulated[:, -1:] < mass).any():
        falling = _falling(weights, weights.shape[1])
        cumulated = falling.cumsum(dim=-1)
    last = torch.searchsorted(cumulated, mass).clamp(max=falling.shape[1] - 1)
    return falling.gather(1, last)


def _falling(values: Tensor, width: int) -> Tensor:
    """The `width` highest values of each row, or all, the highest first.

    numpy's sort and partition use a processor's vector instructions, and are many times faster than torch's.
    """
    rows = values.detach().numpy()
    below = rows.shape[1] - width
    if below > 0:
        rows = np.partition(rows, below, axis=1)[:, below:]
    return torch.from_numpy(np.sort(rows, axis=1)[:, ::-1].copy())


def _least_by_search(scores: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """The same threshold, found digit after digit of its score's key, the highest first, as in a radix selection.

    A digit is the greatest with which the tokens at or above the threshold still make up `mass`.
    """
    keys = _keys(scores)  # (R, V)
    least = torch.zeros_like(mass, dtype=torch.int64)
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        reached = [
            weights.where(keys >= least + (digit << shift), 0.0).sum(dim=-1, keepdim=True) >= mass
            for digit in range(1, 1 << DIGIT_BITS)
        ]
        least = least + (torch.cat(reached, dim=1).sum(dim=1, keepdim=True) << shift)
    return weights.where(keys <= least, 0.0).amax(dim=-1, keepdim=True)


def _keys(scores: Tensor) -> Tensor:
    """The bits of float32 scores (R, V) as int64 from 0 to 2^32 - 1, in the order of the scores."""
    bits = torch.where(scores == 0, 0.0, scores).float().view(torch.int32)  # zero has two signs
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() + (1 << 31)
