"""`capfilt score`: what a Filter says of texts for one image."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch

from blip_core.capfilt.filter import Filter
from blip_core.data.decoding import decode
from blip_core.data.transforms import normalise
from blip_core.errors import ConfigError
from blip_core.med.tokenizer import clean_caption
from flows.pictures import read_picture


def score_texts(
    image: Path,
    texts: Sequence[str],
    filter: str,
    open_with_enc: bool = True,
    image_size: int | None = None,
    tokenizer: str | None = None,
) -> pa.Table:
    """One row a text: text, itm_score (probability of 'match', 0..1) and itc_score (cosine, -1..1).

    Raises ConfigError for a text without a word, InputError for a file that is no whole image, and CheckpointError
    as `Filter.load` does.
    """
    if wordless := [text for text in texts if not clean_caption(text)]:
        raise ConfigError(f"text {wordless[0]!r}: holds no word; expected a text to score")
    picture = read_picture(image)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge = Filter.load(filter, device, image_size, tokenizer)
    size = judge.med.image_size
    pixels = decode([picture], [size]).pixels[size].to(device)
    (scores,) = judge.score(normalise(pixels), [texts], open_with_enc)
    return pa.table(
        {
            "text": list(texts),
            "itm_score": [score.itm for score in scores],
            "itc_score": [score.itc for score in scores],
        }
    )
