"""MED, the multimodal mixture of encoder-decoder (BLIP, section 3.1, figure 2).

The model receives its parts and downloads nothing; `build_med` wires them from a configuration. Its faces:
`encode_image`, `embed_text` (the text encoder), `match` (the image-grounded text encoder) and `decode` (the
image-grounded text decoder). Every one of them takes image features, so that an image is encoded once.
"""

from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.errors import ConfigError
from blip_core.med.image_encoder import ImageEncoder
from blip_core.med.text_transformer import DecoderCache, TextTransformer
from blip_core.settings import Settings, setting

INITIAL_TEMPERATURE = 0.07
TEMPERATURE_RANGE = (0.001, 0.5)


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
    """A preset, and what of it is to be different (null: the preset's value)."""

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

    Args:
        image_encoder: images to (B, N, image width).
        text: the text transformer with both self-attentions.
        projection: width E of the ITC embeddings.
        encode_id, decode_id: token ids of [ENC] and [DEC], put in the place of [CLS].
    """

    def __init__(
        self, image_encoder: ImageEncoder, text: TextTransformer, projection: int, encode_id: int, decode_id: int
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text = text
        self.image_projection = nn.Linear(image_encoder.width, projection)
        self.text_projection = nn.Linear(text.width, projection)
        self.itm_head = nn.Linear(text.width, 2)
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        self.encode_id = encode_id
        self.decode_id = decode_id

    @property
    def image_size(self) -> int:
        return self.image_encoder.vit.patch_embed.img_size[0]

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to features (B, N, image width)."""
        return self.image_encoder(images)

    def project_image(self, image_features: Tensor) -> Tensor:
        """Image features (B, N, D) to ITC embeddings (B, E) of unit length."""
        return F.normalize(self.image_projection(image_features[:, 0]), dim=-1)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Texts (B, L) to ITC embeddings (B, E) of unit length, through the text encoder ([CLS])."""
        hidden = self.text(ids, mask, "encoder")
        return F.normalize(self.text_projection(hidden[:, 0]), dim=-1)

    def match(self, image_features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """ITM logits (B, 2), index 1 for 'match', through the image-grounded text encoder ([ENC])."""
        hidden = self.text(_replace_first(ids, self.encode_id), mask, "encoder", image_features)
        return self.itm_head(hidden[:, 0])

    def decode(self, image_features: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits (B, L, V) of the token after each place, through the image-grounded text decoder ([DEC])."""
        hidden = self.text(_replace_first(ids, self.decode_id), mask, "decoder", image_features)
        return self.text.predict(hidden)

    def decode_step(self, tokens: Tensor, cache: DecoderCache) -> Tensor:
        """Logits (R, V) after the last of the new tokens (R, L); the cache grows by them."""
        hidden = self.text(tokens, None, "decoder", cache=cache)
        return self.text.predict(hidden[:, -1])


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


def build_med(architecture: Architecture, vocabulary: int, encode_id: int, decode_id: int) -> MED:
    """A freshly initialised MED of these sizes; torch's global seed decides the weights."""
    image_encoder = build_image_encoder(architecture)
    text = TextTransformer(
        vocabulary,
        architecture.text_width,
        architecture.text_depth,
        architecture.text_heads,
        architecture.image_width,
        dropout=architecture.dropout,
    )
    return MED(image_encoder, text, architecture.projection, encode_id, decode_id)


def architecture_from(values: dict[str, float]) -> Architecture:
    """The inverse of `dataclasses.asdict`; raises ConfigError naming a size that is missing or unknown."""
    names = {field.name for field in fields(Architecture)}
    if wrong := names ^ set(values):
        raise ConfigError(f"architecture: missing or unknown sizes {sorted(wrong)}; expected {sorted(names)}")
    return Architecture(**values)  # type: ignore[arg-type]
