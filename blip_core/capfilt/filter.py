"""The Filter: says whether a text, web or synthetic, belongs to an image (BLIP, section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.med.checkpoint import load_med
from blip_core.med.med import MED
from blip_core.med.tokenizer import Tokenizer


class Score(NamedTuple):
    """The Filter's judgement of one text for one image."""

    itm: float  # probability of 'match', 0..1
    itc: float  # cosine of the embeddings, -1..1


@dataclass(frozen=True)
class Filter:
    """A MED fine-tuned with ITC and ITM."""

    med: MED
    tokenizer: Tokenizer
    digest: str

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        image_size: int | None = None,
        tokenizer: str | Path | None = None,
    ) -> "Filter":
        """From any checkpoint with a text encoder that `load_med` reads. Raises CheckpointError as it does."""
        loaded = load_med(source, device, image_size, tokenizer, face="encoder")
        return cls(loaded.med, loaded.tokenizer, loaded.digest)

    @torch.inference_mode()
    def score(self, images: Tensor, texts: Sequence[Sequence[str]], open_with_enc: bool = True) -> list[list[Score]]:
        """Scores of every text for its image, each image encoded once.

        Args:
            images: (B, 3, S, S), normalised.
            texts: for each image its texts, none of them empty.
            open_with_enc: as in `MED.match`.
        """
        flat = [text for row in texts for text in row]
        if not flat:
            return [[] for _ in texts]
        features = self.med.encode_image(images)
        counts = torch.tensor([len(row) for row in texts], device=features.device)
        owner = torch.arange(len(texts), device=features.device).repeat_interleave(counts)
        ids, mask = (part.to(features.device) for part in self.tokenizer(flat))
        image = self.med.cross_keys(features)
        itm = F.softmax(self.med.match(image.select(owner), ids, mask, open_with_enc).float(), dim=1)[:, 1]
        itc = (self.med.project_image(features)[owner] * self.med.embed_text(ids, mask)).sum(dim=1)
        scores = iter([Score(*pair) for pair in zip(itm.tolist(), itc.tolist(), strict=True)])
        return [[next(scores) for _ in row] for row in texts]
