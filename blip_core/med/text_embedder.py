"""The text side of a MED alone: texts to ITC embeddings. The image encoder, most of the model, is let go."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from blip_core.med.checkpoint import load_med
from blip_core.med.inference import prepare
from blip_core.med.med import MED
from blip_core.med.tokenizer import Tokenizer, clean_caption

TEXTS_AT_ONCE = 64


class TextEmbedder:
    """Embeds texts on a CPU, as the Filter does when it scores them."""

    def __init__(self, med: MED, tokenizer: Tokenizer) -> None:
        self.med = med
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, source: str | Path) -> "TextEmbedder":
        """From any checkpoint with a text encoder that `load_med` reads. Raises CheckpointError as it does."""
        loaded = load_med(source, face="encoder")
        setattr(loaded.med, "image_encoder", nn.Identity())  # noqa: B010  (mypy knows it by its class)
        prepare(loaded.med, "fp32")
        return cls(loaded.med, loaded.tokenizer)

    def __call__(self, texts: Sequence[str]) -> list[list[float] | None]:
        """The embedding of each text, of unit length; None for one without a word."""
        told = [text for text in texts if clean_caption(text)]
        parts = [self._embed(told[start : start + TEXTS_AT_ONCE]) for start in range(0, len(told), TEXTS_AT_ONCE)]
        embeddings = (row for part in parts for row in part.tolist())
        return [next(embeddings) if clean_caption(text) else None for text in texts]

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        return self.med.embed_text(*self.tokenizer(texts))  # (B, E)
