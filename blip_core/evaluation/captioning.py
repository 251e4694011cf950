"""BLEU-4 and CIDEr of captions against references, by the COCO caption evaluation's own code, without its Java."""

import re
from collections.abc import Sequence

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

PUNCTUATION = re.compile(r"[^\w\s'-]|_")


def caption_scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus scores of one candidate an image against that image's references.

    CIDEr weighs words by how few of the images mention them, so it needs several images and is 0 for one.
    Texts are compared in lower case without punctuation, in place of the Java tokenizer of the original.

    Returns {"bleu4": 0..1, "cider": 0..10} (tables print CIDEr times 100).
    """
    found = {number: [_words(text)] for number, text in enumerate(candidates)}
    wanted = {number: [_words(text) for text in texts] for number, texts in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    cider, _ = Cider().compute_score(wanted, found)
    return {"bleu4": float(bleu[3]), "cider": float(cider)}


def _words(text: str) -> str:
    return " ".join(PUNCTUATION.sub(" ", text.lower()).split())
