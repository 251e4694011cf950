"""A Filter of random weights, small enough to be made in a moment."""

from pathlib import Path

import torch

from blip_core.med.architecture import Architecture
from blip_core.med.checkpoint import save_med
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer

WORDS = ["a red circle", "two green rings", "a blue square under a star"]


def save_filter(folder: Path, seed: int = 0) -> str:
    """Writes a checkpoint whose texts have embeddings far from each other, of 16 numbers; returns its digest."""
    words = Tokenizer.train(WORDS, 100, 12)
    architecture = Architecture(16, 8, 32, 1, 2, 32, 1, 2, 16, 0.0, 0.0)
    torch.manual_seed(seed)
    med = build_med(architecture, len(words), words.encode_id, words.decode_id)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return save_med(folder, med, architecture, words, {})
