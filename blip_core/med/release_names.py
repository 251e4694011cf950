"""The names of the original release (salesforce/BLIP), whose files are `torch.save({"model": state dict, ...})`.

BLIP_Pretrain has both faces, with the shared weights under both of them; BLIP_Retrieval and BLIP_ITM have the text
encoder, BLIP_Decoder the text decoder.
"""

from blip_core.med.names import NameTable

IMAGE = (
    ("image_encoder.vit.cls_token", "visual_encoder.cls_token"),
    ("image_encoder.vit.pos_embed", "visual_encoder.pos_embed"),
    ("image_encoder.vit.patch_embed.proj.*", "visual_encoder.patch_embed.proj.*"),
    ("image_encoder.vit.blocks.N.norm1.*", "visual_encoder.blocks.N.norm1.*"),
    ("image_encoder.vit.blocks.N.attn.qkv.*", "visual_encoder.blocks.N.attn.qkv.*"),
    ("image_encoder.vit.blocks.N.attn.proj.*", "visual_encoder.blocks.N.attn.proj.*"),
    ("image_encoder.vit.blocks.N.norm2.*", "visual_encoder.blocks.N.norm2.*"),
    ("image_encoder.vit.blocks.N.mlp.fc1.*", "visual_encoder.blocks.N.mlp.fc1.*"),
    ("image_encoder.vit.blocks.N.mlp.fc2.*", "visual_encoder.blocks.N.mlp.fc2.*"),
    ("image_encoder.vit.norm.*", "visual_encoder.norm.*"),
)

SHARED = (
    ("text.words.weight", "T.embeddings.word_embeddings.weight"),
    ("text.positions.weight", "T.embeddings.position_embeddings.weight"),
    ("text.norm.*", "T.embeddings.LayerNorm.*"),
    ("text.layers.N.cross_attention.query.*", "T.encoder.layer.N.crossattention.self.query.*"),
    ("text.layers.N.cross_attention.key.*", "T.encoder.layer.N.crossattention.self.key.*"),
    ("text.layers.N.cross_attention.value.*", "T.encoder.layer.N.crossattention.self.value.*"),
    ("text.layers.N.cross_attention.output.*", "T.encoder.layer.N.crossattention.output.dense.*"),
    ("text.layers.N.cross_attention.norm.*", "T.encoder.layer.N.crossattention.output.LayerNorm.*"),
    ("text.layers.N.feed_forward.expand.*", "T.encoder.layer.N.intermediate.dense.*"),
    ("text.layers.N.feed_forward.contract.*", "T.encoder.layer.N.output.dense.*"),
    ("text.layers.N.feed_forward.norm.*", "T.encoder.layer.N.output.LayerNorm.*"),
)

ENCODER = (
    ("text.layers.N.self_attention.encoder.query.*", "T.encoder.layer.N.attention.self.query.*"),
    ("text.layers.N.self_attention.encoder.key.*", "T.encoder.layer.N.attention.self.key.*"),
    ("text.layers.N.self_attention.encoder.value.*", "T.encoder.layer.N.attention.self.value.*"),
    ("text.layers.N.self_attention.encoder.output.*", "T.encoder.layer.N.attention.output.dense.*"),
    ("text.layers.N.self_attention.encoder.norm.*", "T.encoder.layer.N.attention.output.LayerNorm.*"),
    ("image_projection.*", "vision_proj.*"),
    ("text_projection.*", "text_proj.*"),
    ("itm_head.*", "itm_head.*"),
)

DECODER = (
    ("text.layers.N.self_attention.decoder.query.*", "T.encoder.layer.N.attention.self.query.*"),
    ("text.layers.N.self_attention.decoder.key.*", "T.encoder.layer.N.attention.self.key.*"),
    ("text.layers.N.self_attention.decoder.value.*", "T.encoder.layer.N.attention.self.value.*"),
    ("text.layers.N.self_attention.decoder.output.*", "T.encoder.layer.N.attention.output.dense.*"),
    ("text.layers.N.self_attention.decoder.norm.*", "T.encoder.layer.N.attention.output.LayerNorm.*"),
    ("text.head_transform.*", "text_decoder.cls.predictions.transform.dense.*"),
    ("text.head_norm.*", "text_decoder.cls.predictions.transform.LayerNorm.*"),
    ("text.head_bias", "text_decoder.cls.predictions.bias"),
    # both are kept a second time, in the layer that predicts
    ("text.head_bias", "text_decoder.cls.predictions.decoder.bias"),
    ("text.words.weight", "text_decoder.cls.predictions.decoder.weight"),
)

# a buffer that counts from 0 to 511
POSITION_IDS = "T.embeddings.position_ids"

RELEASE = NameTable(
    image=IMAGE,
    shared=SHARED,
    faces={"encoder": ENCODER, "decoder": DECODER},
    roots={"encoder": "text_encoder", "decoder": "text_decoder.bert"},
    # the published ITM and captioning models have no temperature
    optional=(("temperature", "temp"),),
    # the pointer's name is not the same in pre-training and in retrieval
    left_out=(POSITION_IDS, "image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue"),
    momentum=("visual_encoder", "text_encoder", "vision_proj", "text_proj"),
)
