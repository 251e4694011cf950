"""The Captioner: writes synthetic texts for web images (BLIP, section 3.3), by nucleus sampling by default."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blip_core.med.checkpoint import load_med
from blip_core.med.decoding import GenerationConfig
from blip_core.med.generation import generate
from blip_core.med.inference import Precision, encode_images, prepare
from blip_core.med.med import MED
from blip_core.med.tokenizer import Tokenizer


@dataclass(frozen=True)
class Captioner:
    """A MED fine-tuned with LM.

    Attributes:
        static: whether it decodes in fixed shapes, as `generate` says.
    """

    med: MED
    tokenizer: Tokenizer
    digest: str
    static: bool = False

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        tokenizer: str | Path | None = None,
        compile: bool = False,
    ) -> "Captioner":
        """From any checkpoint with a text decoder that `load_med` reads, to be used as `inference.prepare` says.

        Raises CheckpointError as `load_med` does, and ConfigError for a precision that the device does not have.
        """
        loaded = load_med(source, device, tokenizer=tokenizer, face="decoder")
        prepare(loaded.med, precision, compile)
        on_gpu = next(loaded.med.parameters()).is_cuda
        return cls(loaded.med, loaded.tokenizer, loaded.digest, static=compile and on_gpu)

    @torch.inference_mode()
    def caption(
        self, images: Tensor, generation: GenerationConfig, seeds: Sequence[Sequence[int]]
    ) -> list[list[tuple[str, float]]]:
        """Captions of images, each image encoded once.

        Args:
            images: (B, 3, S, S), normalised.
            generation: how to decode.
            seeds: for each image the seeds of its captions, as many for each.

        Returns:
            For each image its captions: text and mean token log-probability.
        """
        image = self.med.cross_keys(encode_images(self.med, images))
        every_seed = [seed for row in seeds for seed in row]
        flat = iter(generate(self.med, self.tokenizer, image, generation, every_seed, self.static))
        return [[next(flat) for _ in row] for row in seeds]
