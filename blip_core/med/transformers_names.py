"""The names of transformers' BLIP: BlipForImageTextRetrieval and BlipForConditionalGeneration.

Its image encoder has names of its own; its text transformers and heads kept the release's.
"""

from blip_core.med import release_names
from blip_core.med.names import NameTable

IMAGE = (
    ("image_encoder.vit.cls_token", "vision_model.embeddings.class_embedding"),
    ("image_encoder.vit.pos_embed", "vision_model.embeddings.position_embedding"),
    ("image_encoder.vit.patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
    ("image_encoder.vit.blocks.N.norm1.*", "vision_model.encoder.layers.N.layer_norm1.*"),
    ("image_encoder.vit.blocks.N.attn.qkv.*", "vision_model.encoder.layers.N.self_attn.qkv.*"),
    ("image_encoder.vit.blocks.N.attn.proj.*", "vision_model.encoder.layers.N.self_attn.projection.*"),
    ("image_encoder.vit.blocks.N.norm2.*", "vision_model.encoder.layers.N.layer_norm2.*"),
    ("image_encoder.vit.blocks.N.mlp.fc1.*", "vision_model.encoder.layers.N.mlp.fc1.*"),
    ("image_encoder.vit.blocks.N.mlp.fc2.*", "vision_model.encoder.layers.N.mlp.fc2.*"),
    ("image_encoder.vit.norm.*", "vision_model.post_layernorm.*"),
)

TRANSFORMERS = NameTable(
    image=IMAGE,
    shared=release_names.SHARED,
    faces=release_names.RELEASE.faces,
    roots=release_names.RELEASE.roots,
    copies=("text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.decoder.weight"),
    # only older versions save it
    left_out=(release_names.POSITION_IDS,),
)
