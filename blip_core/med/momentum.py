"""The momentum encoders and the queue of their embeddings (BLIP, section 3.2, after MoCo and ALBEF).

The momentum text encoder only ever runs without an image, so it has neither cross-attention nor decoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.med.architecture import Architecture
from blip_core.med.med import MED, build_image_encoder, compile_layers
from blip_core.med.text_transformer import TextTransformer

NO_IMAGE = -1


class MomentumEncoders(nn.Module):
    """Slow copies of MED's unimodal encoders, moved towards it after each step."""

    def __init__(self, med: MED, architecture: Architecture) -> None:
        super().__init__()
        self.image_encoder = build_image_encoder(architecture)
        self.text = TextTransformer(
            med.text.words.num_embeddings,
            architecture.text_width,
            architecture.text_depth,
            architecture.text_heads,
            image_width=None,
            dropout=architecture.dropout,
            faces=("encoder",),
        )
        self.image_projection = nn.Linear(architecture.image_width, architecture.projection)
        self.text_projection = nn.Linear(architecture.text_width, architecture.projection)
        self.requires_grad_(False)
        self.follow(med, momentum=0.0)

    @torch.no_grad()
    def follow(self, med: MED, momentum: float) -> None:
        """own = momentum * own + (1 - momentum) * MED's, for every parameter."""
        theirs = dict(med.named_parameters())
        own = dict(self.named_parameters())
        torch._foreach_mul_(list(own.values()), momentum)
        torch._foreach_add_(list(own.values()), [theirs[name] for name in own], alpha=1 - momentum)

    @torch.no_grad()
    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of images (B, 3, S, S) and of texts (B, L), both (B, E) of unit length."""
        image = self.image_projection(self.image_encoder(images)[:, 0])
        text = self.text_projection(self.text(ids, mask, "encoder")[:, 0])
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def compile_layers(self) -> None:
        """Compiles the layers of both encoders in place; names of parameters stay as they are."""
        compile_layers(self.image_encoder, self.text)


class EmbeddingQueue(nn.Module):
    """A ring of the last K momentum embeddings; takes batches of any size, and starts with random directions."""

    images: Tensor  # (K, E)
    texts: Tensor  # (K, E)
    image_ids: Tensor  # (K,)
    pointer: Tensor  # (), the oldest entry

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("images", F.normalize(torch.randn(size, width), dim=-1))
        self.register_buffer("texts", F.normalize(torch.randn(size, width), dim=-1))
        self.register_buffer("image_ids", torch.full((size,), NO_IMAGE))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, images: Tensor, texts: Tensor, image_ids: Tensor) -> None:
        """Overwrites the oldest entries with (B, E), (B, E) and (B,); of a batch beyond K the last K stay."""
        size = self.images.shape[0]
        images, texts, image_ids = images[-size:], texts[-size:], image_ids[-size:]
        places = (self.pointer + torch.arange(images.shape[0], device=images.device)) % size
        self.images[places] = images.to(self.images.dtype)
        self.texts[places] = texts.to(self.texts.dtype)
        self.image_ids[places] = image_ids
        self.pointer.copy_((self.pointer + images.shape[0]) % size)
