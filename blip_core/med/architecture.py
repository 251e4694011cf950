"""What a MED is before it is built: its sizes, the settings that choose them, and the faces that it can have.

Like all that settings are read from, this imports no torch.
"""

from dataclasses import asdict, dataclass, fields
from typing import Literal

from blip_core.errors import ConfigError
from blip_core.settings import Settings, setting

Face = Literal["encoder", "decoder"]
FACES: tuple[Face, ...] = ("encoder", "decoder")
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


def architecture_from(values: dict[str, float]) -> Architecture:
    """The inverse of `dataclasses.asdict`; raises ConfigError naming a size that is missing or unknown."""
    names = {field.name for field in fields(Architecture)}
    if wrong := names ^ set(values):
        raise ConfigError(f"architecture: missing or unknown sizes {sorted(wrong)}; expected {sorted(names)}")
    return Architecture(**values)  # type: ignore[arg-type]
