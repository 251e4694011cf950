"""Parity with transformers' BLIP: the same random weights must give the same numbers.

The mapping of names follows the paper's figure 2: their decoder and their text encoder share everything but
self-attention once the encoder's weights are set to the decoder's, as the official code ties them.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from blip_core.med.generation import CachedDecoder, GenerationConfig, beam_search, greedy
from blip_core.med.lm import lm_loss
from blip_core.med.med import MED, Architecture, build_med
from blip_core.med.text_transformer import CrossKeys

VOCABULARY, END, DECODE, ENCODE = 50, 3, 48, 49
CPU = torch.device("cpu")

IMAGE_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TEXT_NAMES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
}
ATTENTION_NAMES = {
    "query": "self.query",
    "key": "self.key",
    "value": "self.value",
    "output": "output.dense",
    "norm": "output.LayerNorm",
}
FEED_FORWARD_NAMES = {"expand": "intermediate.dense", "contract": "output.dense", "norm": "output.LayerNorm"}
HEAD_NAMES = {"head_transform": "transform.dense", "head_norm": "transform.LayerNorm"}


class Twins(NamedTuple):
    """One set of weights in three models, and an input for them."""

    med: MED
    captioner: BlipForConditionalGeneration
    retriever: BlipForImageTextRetrieval
    images: Tensor
    ids: Tensor
    mask: Tensor


def _theirs(name: str) -> tuple[str, str]:
    """Which of their two models has a weight of ours, and under what name."""
    part, _, inner = name.partition(".")
    if part != "image_encoder" and part != "text":
        return "retriever", name.replace("image_projection", "vision_proj").replace("text_projection", "text_proj")
    stem, _, kind = inner.rpartition(".")
    if part == "image_encoder":
        stem, _, kind = inner.removeprefix("vit.").rpartition(".")
        if stem.startswith("blocks."):
            _, number, block = stem.split(".", 2)
            return "captioner", f"vision_model.encoder.layers.{number}.{BLOCK_NAMES[block]}.{kind}"
        if not stem:
            return "captioner", f"vision_model.{IMAGE_NAMES[kind]}"
        return "captioner", f"vision_model.{IMAGE_NAMES[stem]}.{kind}"
    if inner == "head_bias":
        return "captioner", "text_decoder.cls.predictions.bias"
    if stem in HEAD_NAMES:
        return "captioner", f"text_decoder.cls.predictions.{HEAD_NAMES[stem]}.{kind}"
    if stem in TEXT_NAMES:
        return "captioner", f"text_decoder.bert.{TEXT_NAMES[stem]}.{kind}"
    _, number, layer = stem.split(".", 2)
    if layer.startswith("self_attention.encoder."):
        place = ATTENTION_NAMES[layer.rpartition(".")[2]]
        return "retriever", f"text_encoder.encoder.layer.{number}.attention.{place}.{kind}"
    root, last = f"text_decoder.bert.encoder.layer.{number}", layer.rpartition(".")[2]
    if layer.startswith("self_attention.decoder."):
        return "captioner", f"{root}.attention.{ATTENTION_NAMES[last]}.{kind}"
    if layer.startswith("cross_attention."):
        return "captioner", f"{root}.crossattention.{ATTENTION_NAMES[last]}.{kind}"
    return "captioner", f"{root}.{FEED_FORWARD_NAMES[last]}.{kind}"


def _their_models() -> tuple[BlipForConditionalGeneration, BlipForImageTextRetrieval]:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "encoder_hidden_size": 48,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": DECODE,
        "sep_token_id": END,
        "eos_token_id": END,
        "pad_token_id": 0,
        "label_smoothing": 0.1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
    }
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    captioner = BlipForConditionalGeneration(config).eval()
    retriever = BlipForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for parameter in [*captioner.parameters(), *retriever.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
        captioner.text_decoder.cls.predictions.bias[END] += 0.9  # some of the texts are to end early
    shared = {name: tensor for name, tensor in captioner.state_dict().items() if name.startswith("vision_model.")}
    for name, tensor in captioner.text_decoder.bert.state_dict().items():
        if ".attention." not in name:
            shared[f"text_encoder.{name}"] = tensor
    assert not retriever.load_state_dict(shared, strict=False).unexpected_keys
    return captioner, retriever


@pytest.fixture(scope="module")
def twins() -> Twins:
    torch.manual_seed(0)
    captioner, retriever = _their_models()
    med = build_med(Architecture(16, 8, 48, 2, 3, 32, 2, 4, 16, 0.0, 0.0), VOCABULARY, ENCODE, DECODE).eval()
    weights = {"captioner": captioner.state_dict(), "retriever": retriever.state_dict()}
    sources = {name: _theirs(name) for name in med.state_dict() if name != "temperature"}
    assert len(set(sources.values())) == len(sources)
    mapped = {name: weights[model][theirs] for name, (model, theirs) in sources.items()}
    med.load_state_dict({**mapped, "temperature": torch.tensor([0.07])})
    images = torch.randn(2, 3, 16, 16)
    ids = torch.tensor([[2, 10, 11, 12, 13, END], [2, 20, 21, END, 0, 0]])
    return Twins(med, captioner, retriever, images, ids, ids != 0)


def _grounded(twins: Twins, images: Tensor) -> CrossKeys:
    return twins.med.cross_keys(twins.med.encode_image(images))


def _opened(ids: Tensor, token: int) -> Tensor:
    return torch.cat([torch.full((len(ids), 1), token), ids[:, 1:]], dim=1)


@torch.inference_mode()
def test_image_features_agree(twins: Twins) -> None:
    theirs = twins.captioner.vision_model(twins.images).last_hidden_state
    assert torch.allclose(twins.med.encode_image(twins.images), theirs, atol=1e-4)


@torch.inference_mode()
def test_caption_logits_and_loss_agree(twins: Twins) -> None:
    opened = _opened(twins.ids, DECODE)
    labels = opened.masked_fill(~twins.mask, -100)
    theirs = twins.captioner(
        pixel_values=twins.images, input_ids=opened, attention_mask=twins.mask.long(), labels=labels
    )
    logits = twins.med.decode(_grounded(twins, twins.images), twins.ids, twins.mask)
    assert torch.allclose(logits[twins.mask], theirs.logits[twins.mask], atol=1e-4)
    assert logits.std() > 0.5
    assert lm_loss(logits, twins.ids, twins.mask).item() == pytest.approx(theirs.loss.item(), abs=1e-4)


@torch.inference_mode()
def test_itm_logits_agree_when_theirs_opens_with_enc(twins: Twins) -> None:
    theirs = twins.retriever(_opened(twins.ids, ENCODE), twins.images, attention_mask=twins.mask.long()).itm_score
    ours = twins.med.match(_grounded(twins, twins.images), twins.ids, twins.mask)
    assert torch.allclose(ours, theirs, atol=1e-4)
    without = twins.retriever(twins.ids, twins.images, attention_mask=twins.mask.long()).itm_score
    assert not torch.allclose(ours, without, atol=1e-3)


@torch.inference_mode()
def test_itc_features_agree(twins: Twins) -> None:
    theirs = twins.retriever(twins.ids, twins.images, attention_mask=twins.mask.long(), use_itm_head=False)
    image = twins.med.project_image(twins.med.encode_image(twins.images))
    text = twins.med.embed_text(twins.ids, twins.mask)
    hidden = F.normalize(twins.retriever.text_proj(theirs.question_embeds[:, 0]), dim=1)
    assert torch.allclose(text, hidden, atol=1e-4)
    assert torch.allclose(image @ text.T, theirs.itm_score, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@torch.inference_mode()
def test_decoding_agrees_token_for_token(twins: Twins, beams: int) -> None:
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    config = GenerationConfig(beams=beams, max_length=8, min_length=2)
    # their lengths count [DEC]
    theirs = twins.captioner.generate(
        images, num_beams=beams, do_sample=False, min_length=config.min_length + 1, max_length=config.max_length + 1
    )
    decoder = CachedDecoder(twins.med, _grounded(twins, images))
    decode = greedy if beams == 1 else beam_search
    ours = decode(decoder, [DECODE], 12, END, config, CPU)
    assert len({len(caption.tokens) for caption in ours}) > 1
    for caption, tokens in zip(ours, theirs.tolist(), strict=True):
        text = tokens[1:]
        assert caption.tokens == (text[: text.index(END)] if END in text else text)
