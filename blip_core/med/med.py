"""MED, the multimodal mixture of encoder-decoder (BLIP, section 3.1, figure 2).

The model receives its parts and downloads nothing; `build_med` wires them from a configuration. Its faces:
`encode_image`, `embed_text` (the text encoder), `match` (the image-grounded text encoder) and `decode` (the
image-grounded text decoder). The grounded ones take `cross_keys` of image features, so that an image is encoded,
and projected for the cross-attention, once.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.errors import CheckpointError
from blip_core.med.architecture import FACES, WITHOUT, Architecture, Face
from blip_core.med.image_encoder import ImageEncoder
from blip_core.med.text_transformer import CrossKeys, DecoderCache, TextTransformer

INITIAL_TEMPERATURE = 0.07
TEMPERATURE_RANGE = (0.001, 0.5)


class MED(nn.Module):
    """One model, three objectives' faces.

    A MED whose text transformer lacks a face lacks what only that face uses: without 'encoder' there are no ITC
    projections, ITM head and temperature, without 'decoder' no LM head. What needs them raises CheckpointError.

    Args:
        image_encoder: images to (B, N, image width).
        text: the text transformer with its self-attentions.
        projection: width E of the ITC embeddings.
        encode_id, decode_id: token ids of [ENC] and [DEC], put in the place of [CLS].
    """

    def __init__(
        self, image_encoder: ImageEncoder, text: TextTransformer, projection: int, encode_id: int, decode_id: int
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text = text
        if "encoder" in text.faces:
            self.image_projection = nn.Linear(image_encoder.width, projection)
            self.text_projection = nn.Linear(text.width, projection)
            self.itm_head = nn.Linear(text.width, 2)
            # of shape (1,): FSDP2 shards no scalar
            self.temperature = nn.Parameter(torch.full((1,), INITIAL_TEMPERATURE))
        self.encode_id = encode_id
        self.decode_id = decode_id

    @property
    def image_size(self) -> int:
        return self.image_encoder.vit.patch_embed.img_size[0]

    @property
    def faces(self) -> tuple[Face, ...]:
        """Which of the text transformer's self-attentions there are."""
        return self.text.faces

    def require(self, face: Face) -> None:
        """Raises CheckpointError where this MED lacks the face."""
        if face not in self.faces:
            raise CheckpointError(f"this checkpoint has no text {face}: it can {WITHOUT[face]}")

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to features (B, N, image width)."""
        return self.image_encoder(images)

    def cross_keys(self, image_features: Tensor, image_mask: Tensor | None = None) -> CrossKeys:
        """What the grounded faces look at: keys and values of image features (B, N, image width).

        Args:
            image_mask: (B, N) bool, False where a feature is padding; None where nothing is padded.
        """
        return self.text.cross_keys(image_features, image_mask)

    def project_image(self, image_features: Tensor) -> Tensor:
        """Image features (B, N, D) to ITC embeddings (B, E) of unit length."""
        self.require("encoder")
        return F.normalize(self.image_projection(image_features[:, 0]).float(), dim=-1)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Texts (B, L) to ITC embeddings (B, E) of unit length, through the text encoder ([CLS])."""
        self.require("encoder")
        hidden = self.text(ids, mask, "encoder", first=True)
        return F.normalize(self.text_projection(hidden[:, 0]).float(), dim=-1)

    def match(self, image: CrossKeys, ids: Tensor, mask: Tensor, open_with_enc: bool = True) -> Tensor:
        """ITM logits (B, 2), index 1 for 'match', through the image-grounded text encoder ([ENC]).

        Args:
            image: of B images, or of B / T images that have T texts each, one after the other.
            open_with_enc: False leaves [CLS] in its place, which ITM was not trained on, to reproduce the numbers of
                the official blip_itm.py and of transformers' BLIP.
        """
        self.require("encoder")
        opened = _replace_first(ids, self.encode_id) if open_with_enc else ids
        hidden = self.text(opened, mask, "encoder", image, first=True)
        return self.itm_head(hidden[:, 0])

    def decode(self, image: CrossKeys, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits (B, L, V) of the token after each place, through the image-grounded text decoder ([DEC])."""
        self.require("decoder")
        hidden = self.text(_replace_first(ids, self.decode_id), mask, "decoder", image)
        return self.text.predict(hidden)

    def decode_step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """Logits (R, V) after the last of the new tokens (R, L); the cache grows by them."""
        self.require("decoder")
        hidden = self.text(tokens, None, "decoder", cache=cache)
        return self.text.predict(hidden[:, -1])

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Whether training keeps a layer's activations or computes them again in the backward pass."""
        self.image_encoder.vit.set_grad_checkpointing(on)
        self.text.checkpointing = on

    def compile_layers(self) -> None:
        """Compiles the layers of both transformers in place; names of parameters stay as they are."""
        # what was compiled before for other models would count against torch's limit of variants
        torch.compiler.reset()
        compile_layers(self.image_encoder, self.text)


def _replace_first(ids: Tensor, token: int) -> Tensor:
    replaced = ids.clone()
    replaced[:, 0] = token
    return replaced


def build_image_encoder(architecture: Architecture) -> ImageEncoder:
    """A freshly initialised image encoder of these sizes."""
    return ImageEncoder(
        architecture.image_size,
        architecture.patch_size,
        architecture.image_width,
        architecture.image_depth,
        architecture.image_heads,
        architecture.drop_path,
    )


def build_med(
    architecture: Architecture, vocabulary: int, encode_id: int, decode_id: int, faces: tuple[Face, ...] = FACES
) -> MED:
    """A freshly initialised MED of these sizes and faces; torch's global seed decides the weights."""
    image_encoder = build_image_encoder(architecture)
    text = TextTransformer(
        vocabulary,
        architecture.text_width,
        architecture.text_depth,
        architecture.text_heads,
        architecture.image_width,
        dropout=architecture.dropout,
        faces=faces,
    )
    return MED(image_encoder, text, architecture.projection, encode_id, decode_id)


def compile_layers(image_encoder: ImageEncoder, text: TextTransformer) -> None:
    """Compiles the layers of both in place."""
    for block in cast(nn.Sequential, image_encoder.vit.blocks):
        block.compile()
    for layer in text.layers:
        # texts come in many lengths, and the cache of a decoding grows at every step
        layer.compile(dynamic=True)
