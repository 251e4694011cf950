"""The Filter: says whether a text, web or synthetic, belongs to an image (BLIP, section 3.3)."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.med.checkpoint import load_med
from blip_core.med.inference import Precision, encode_images, prepare
from blip_core.med.med import MED
from blip_core.med.tokenizer import TokenBatch, Tokenizer, clean_caption

# Images whose texts are scored at once on a CPU, those with texts of like lengths together; a GPU takes all.
IMAGES_AT_ONCE = 8


class Score(NamedTuple):
    """The Filter's judgement of one text for one image."""

    itm: float  # probability of 'match', 0..1
    itc: float  # cosine of the embeddings, -1..1


class Judged(NamedTuple):
    """What the Filter says of B images: the scores of their texts, and their own ITC embeddings, of unit length."""

    scores: list[list[Score | None]]
    embeddings: Tensor  # (B, E) float32


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
        precision: Precision = "fp32",
        compile: bool = False,
    ) -> "Filter":
        """From any checkpoint with a text encoder that `load_med` reads, to be used as `inference.prepare` says.

        Raises CheckpointError as `load_med` does, and ConfigError for a precision that the device does not have.
        """
        loaded = load_med(source, device, image_size, tokenizer, face="encoder")
        prepare(loaded.med, precision, compile)
        return cls(loaded.med, loaded.tokenizer, loaded.digest)

    @property
    def width(self) -> int:
        """E, the width of the ITC embeddings."""
        return self.med.image_projection.out_features

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), normalised, to ITC embeddings (B, E) of unit length."""
        return self.med.project_image(encode_images(self.med, images))

    @torch.inference_mode()
    def score(self, images: Tensor, texts: Sequence[Sequence[str]], open_with_enc: bool = True) -> list[list[Score]]:
        """Scores of every text for its image, each image encoded once.

        Args:
            images: (B, 3, S, S), normalised.
            texts: for each image its texts, none of them empty.
            open_with_enc: as in `MED.match`.
        """
        if not any(texts):
            return [[] for _ in texts]
        features = encode_images(self.med, images)
        return self._score_all(features, self.med.project_image(features), texts, open_with_enc)

    def judge(self, images: Tensor, texts: Sequence[Sequence[str]]) -> list[list[Score | None]]:
        """The same for any texts: one without a word, which cannot be judged, has None."""
        return self.judge_and_embed(images, texts).scores

    @torch.inference_mode()
    def judge_and_embed(self, images: Tensor, texts: Sequence[Sequence[str]]) -> Judged:
        """The scores of `judge` and the images' own embeddings, each image encoded once for both."""
        features = encode_images(self.med, images)
        embeddings = self.med.project_image(features)
        judgeable = [[bool(clean_caption(text)) for text in row] for row in texts]
        present = [list(itertools.compress(*both)) for both in zip(texts, judgeable, strict=True)]
        scores = [iter(row) for row in self._score_all(features, embeddings, present)]
        return Judged(
            [[next(found) if there else None for there in row] for row, found in zip(judgeable, scores, strict=True)],
            embeddings,
        )

    def _score_all(
        self, features: Tensor, embeddings: Tensor, texts: Sequence[Sequence[str]], open_with_enc: bool = True
    ) -> list[list[Score]]:
        """Scores of texts for images of which features (B, N, D) and embeddings (B, E) are known."""
        if not any(texts):
            return [[] for _ in texts]
        most = max(len(row) for row in texts)
        # as many for every image: those that are missing are scored, and left out of the answer
        tokens = self.tokenizer([text for row in texts for text in [*row, *[""] * (most - len(row))]])
        found: dict[int, list[Score]] = {}
        for rows, some in _alike(tokens, most, len(texts) if features.is_cuda else IMAGES_AT_ONCE):
            moved = TokenBatch(*(part.to(features.device) for part in some))
            scored = self._score(features[rows], embeddings[rows], moved, open_with_enc)
            found |= {row: scored[most * place : most * (place + 1)] for place, row in enumerate(rows)}
        return [found[row][: len(of_image)] for row, of_image in enumerate(texts)]

    def _score(self, features: Tensor, embeddings: Tensor, tokens: TokenBatch, open_with_enc: bool) -> list[Score]:
        """Scores of T texts for each of B images: tokens (B T, L), one image's after the other's."""
        logits = self.med.match(self.med.cross_keys(features), *tokens, open_with_enc)
        itm = F.softmax(logits.float(), dim=1)[:, 1]
        texts = self.med.embed_text(*tokens).unflatten(0, (len(features), -1))  # (B, T, E)
        itc = (embeddings[:, None] * texts).sum(dim=2).flatten()
        return [Score(*pair) for pair in zip(itm.tolist(), itc.tolist(), strict=True)]


def _alike(tokens: TokenBatch, most: int, size: int) -> Iterator[tuple[list[int], TokenBatch]]:
    """Images, `size` at a time and those with short texts first, and the tokens of their `most` texts, cut to fit."""
    ids, mask = (part.unflatten(0, (-1, most)) for part in tokens)  # (B, T, L)
    longest = mask.sum(dim=2).amax(dim=1)
    for rows in longest.argsort(stable=True).split(size):
        length = int(longest[rows[-1]])
        yield rows.tolist(), TokenBatch(*(part[rows, :, :length].flatten(0, 1) for part in (ids, mask)))
