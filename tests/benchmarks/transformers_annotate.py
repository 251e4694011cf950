"""What a user would write today to caption and judge images with transformers' BLIP; `annotate.py` measures against it.

Images come ready to use, in batches: nothing is read, decoded or written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipForImageTextRetrieval


class TransformersAnnotation:
    """BlipForConditionalGeneration, and BlipForImageTextRetrieval once for each text of an image.

    Args:
        encode_id: what opens a text for ITM, as in training; transformers leaves [CLS] there.
    """

    def __init__(self, captioner: Path, filter: Path, device: torch.device, dtype: torch.dtype, encode_id: int) -> None:
        self.captioner: Any = BlipForConditionalGeneration.from_pretrained(captioner, dtype=dtype).to(device).eval()
        self.filter: Any = BlipForImageTextRetrieval.from_pretrained(filter, dtype=dtype).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(filter)
        self.device, self.dtype = device, dtype
        self.encode_id = encode_id

    @torch.inference_mode()
    def annotate(self, images: Tensor, web: Sequence[str], tokens: int) -> list[list[float]]:
        """For each image the scores of its web text and of a caption of so many tokens."""
        images = images.to(self.device, self.dtype)
        captions = self.caption(images, tokens)
        return list(map(list, zip(self.score(images, web), self.score(images, captions), strict=True)))

    @torch.inference_mode()
    def caption(self, images: Tensor, tokens: int) -> list[str]:
        """Nucleus sampling with p = 0.9, and otherwise as `generate` does by default."""
        found = self.captioner.generate(
            pixel_values=images, do_sample=True, top_p=0.9, max_new_tokens=tokens, min_new_tokens=tokens
        )
        return self.tokenizer.batch_decode(found, skip_special_tokens=True)

    @torch.inference_mode()
    def score(self, images: Tensor, texts: Sequence[str]) -> list[float]:
        """The probability of 'match' of one text for each image."""
        given = self.tokenizer(list(texts), padding=True, truncation=True, max_length=35, return_tensors="pt")
        ids = given["input_ids"].to(self.device)
        ids[:, 0] = self.encode_id
        mask = given["attention_mask"].to(self.device)
        answer = self.filter(
            input_ids=ids, attention_mask=mask, pixel_values=images.to(self.device, self.dtype), use_itm_head=True
        )
        return answer.itm_score.float().softmax(dim=1)[:, 1].tolist()
