"""The image encoder: a vision transformer, all of whose tokens the text transformer looks at (BLIP, 3.1).

timm's ViT as BLIP's authors set it: pre-norm, LayerNorm epsilon 1e-6, exact GELU, learned positions, [CLS] first.
"""

import math
from functools import partial
from typing import cast

from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

# Against patch embeddings of variance one, timm's 0.02 leaves a fresh model nearly blind to where a patch lies.
POSITION_DEVIATION = 0.3


class ImageEncoder(nn.Module):
    """Images to image features."""

    def __init__(
        self, image_size: int, patch_size: int, width: int, depth: int, heads: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.width = width
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            global_pool="",
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            weight_init="jax",
        )
        nn.init.trunc_normal_(cast(Tensor, self.vit.pos_embed), std=POSITION_DEVIATION)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), normalised, to features (B, N, D) with N = 1 + (S / patch)² and [CLS] first."""
        return self.vit.forward_features(images)


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n², D) for images of side² patches: (1, 1 + side², D).

    The official code's interpolation: bicubic without anti-aliasing, corners not aligned; [CLS]'s stays as it is.
    """
    n = math.isqrt(positions.shape[1] - 1)
    return resample_abs_pos_embed(positions, [side, side], [n, n], antialias=False, align_corners=False)
