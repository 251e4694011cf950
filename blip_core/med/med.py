"""MED, the multimodal mixture of encoder-decoder (BLIP, section 3.1, figure 2).

The model receives its parts and downloads nothing; `build_med` wires them from a configuration. Its faces:
`encode_image`, `embed_text` (the text encoder), `match` (the image-grounded text encoder) and `decode` (the
image-grounded text decoder). The grounded ones take `cross_keys` of image features, so that an image is encoded,
and projected for the cross-attention, once.
"""

from dataclasses import asdict, dataclass, fields
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.errors import CheckpointError, ConfigError
from blip_core.med.image_encoder import ImageEncoder
from blip_core.med.text_transformer import FACES, CrossKeys, DecoderCache, Face, TextTransformer
from blip_core.settings import Settings, setting

INITIAL_TEMPERATURE = 0.07
TEMPERATURE_RANGE = (0.001, 0.5)
# what a MED without the face can do, and cannot
WITHOUT: dict[Face, str] = {
    "encoder": "write captions, not score texts; expected a Filter's or a pre-trained MED's",
    "decoder": "score texts, not write captions; expected a Captioner's or a pre-trained MED's",
}


@dataclass(frozen=True)
class Architecture:
    """The sizes of a MED, all of them fixed."""

    image_size: int
    patch_size: int
    image_width: int
    image_depth: int
    image_heads: int
    text_width: int
    text_depth: int
    text_heads: int
    projection: int
    drop_path: float
    dropout: float


PRESETS = {
    "tiny": Architecture(32, 8, 64, 2, 2, 64, 2, 2, 64, 0.0, 0.0),
    "small": Architecture(112, 16, 256, 6, 4, 256, 4, 4, 128, 0.0, 0.1),
    "base": Architecture(224, 16, 768, 12, 12, 768, 12, 12, 256, 0.0, 0.1),
    "large": Architecture(224, 16, 1024, 24, 16, 768, 12, 12, 256, 0.1, 0.1),
}


@dataclass(frozen=True)
class MEDConfig(Settings):
    """A preset, what of it is to be different (null: the preset's value), and what a training begins with."""

    preset: Literal["tiny", "small", "base", "large"] = setting(
        "base", "tiny is the demo's; base is ViT-B/16 with BERT-base; large is ViT-L/16 with BERT-base"
    )
    image_size: int | None = setting(None, "side of the square input image in pixels", ge=16, le=1024)
    patch_size: int | None = setting(None, "side of an image patch in pixels", ge=4, le=64)
    image_width: int | None = setting(None, "width of the image encoder", ge=32, le=4096)
    image_depth: int | None = setting(None, "layers of the image encoder", ge=1, le=64)
    image_heads: int | None = setting(None, "attention heads of the image encoder", ge=1, le=64)
    text_width: int | None = setting(None, "width of the text transformer", ge=32, le=4096)
    text_depth: int | None = setting(None, "layers of the text transformer", ge=1, le=64)
    text_heads: int | None = setting(None, "attention heads of the text transformer", ge=1, le=64)
    projection: int | None = setting(None, "width of the ITC embeddings", ge=8, le=4096)
    drop_path: float | None = setting(None, "stochastic depth of the image encoder", ge=0.0, lt=1.0)
    dropout: float | None = setting(None, "dropout of the text transformer", ge=0.0, lt=1.0)
    image_weights: str | None = setting(
        None, "what the image encoder begins with: a ViT of timm, by name or local file; null: random weights"
    )
    text_weights: str | None = setting(
        None, "what the text transformer begins with: a BERT of transformers, by name or folder; null: random weights"
    )

    def architecture(self) -> Architecture:
        """The sizes with the preset's values filled in. Raises ConfigError where they do not fit together."""
        wanted = {
            name: preset if (own := getattr(self, name)) is None else own
            for name, preset in asdict(PRESETS[self.preset]).items()
        }
        for part in ("image", "text"):
            if wanted[f"{part}_width"] % wanted[f"{part}_heads"]:
                raise ConfigError(
                    f"med.{part}_width {wanted[f'{part}_width']} must be a multiple of "
                    f"med.{part}_heads {wanted[f'{part}_heads']}"
                )
        if wanted["image_size"] % wanted["patch_size"]:
            raise ConfigError(
                f"med.image_size {wanted['image_size']} must be a multiple of med.patch_size {wanted['patch_size']}"
            )
        return Architecture(**wanted)


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


def architecture_from(values: dict[str, float]) -> Architecture:
    """The inverse of `dataclasses.asdict`; raises ConfigError naming a size that is missing or unknown."""
    names = {field.name for field in fields(Architecture)}
    if wrong := names ^ set(values):
        raise ConfigError(f"architecture: missing or unknown sizes {sorted(wrong)}; expected {sorted(names)}")
    return Architecture(**values)  # type: ignore[arg-type]
