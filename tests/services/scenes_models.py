"""Checkpoints whose weights are set by hand, so that they are the same on every machine: nothing is learnt.

The text encoder counts words: what shapes, colours, backgrounds and sizes a text names, and not whose they are. All
its numbers are zero or one, so digests and embeddings do not depend on how a machine rounds or draws.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blip_core.med.architecture import Architecture
from blip_core.med.checkpoint import save_med
from blip_core.med.med import MED, build_med
from blip_core.med.tokenizer import Tokenizer
from blip_core.scenes.grammar import BACKGROUNDS, COLOURS, SHAPES, SIZES

WIDTH = 64
WORDS = (*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES)
ARCHITECTURE = Architecture(32, 8, 32, 1, 1, WIDTH, 1, 1, WIDTH, 0.0, 0.0)


def save_counting_med(folder: Path, number: int, origin: Mapping[str, Any], seen: Mapping[str, Any]) -> str:
    """Writes a checkpoint and returns its digest, which `number` alone decides.

    `origin` and `seen` are for config.json and data.json, as a training would write them.
    """
    words = Tokenizer.train(WORDS, 200, 32)
    med = build_med(ARCHITECTURE, len(words), words.encode_id, words.decode_id)
    _count_words(med, words)
    with torch.no_grad():
        med.temperature.fill_(number / 64)
    return save_med(folder, med, ARCHITECTURE, words, dict(origin), dict(seen))


@torch.no_grad()
def _count_words(med: MED, words: Tokenizer) -> None:
    """[CLS] attends to all words alike and takes over their mean; each word of the grammar has a place of its own."""
    for parameter in med.parameters():
        parameter.zero_()
    for module in med.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1)
    for place, word in enumerate(WORDS):
        med.text.words.weight[words.pieces.convert_tokens_to_ids(word), place] = 1
    attention: Any = med.text.layers[0].self_attention["encoder"]
    for linear in (attention.value, attention.output, med.text_projection):
        nn.init.eye_(linear.weight)
