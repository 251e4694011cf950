"""Pre-trained encoders for a MED that is trained from scratch, as the paper begins (BLIP, section 4.1).

The image encoder comes from a ViT of timm, the text transformer from a BERT of transformers: by name, which needs a
network, or from a local file or folder, which does not. Cross-attention, the two tokens that BERT has not, and the
heads of ITC and ITM stay fresh. Loading is strict: what is left out is named here, and all else must fit.
"""

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertForMaskedLM
from transformers.utils import logging

from blip_core.errors import CheckpointError, first_line
from blip_core.med.architecture import FACES, MEDConfig
from blip_core.med.bert_names import BERT
from blip_core.med.image_encoder import ImageEncoder, resize_positions
from blip_core.med.med import MED
from blip_core.med.names import to_ours
from blip_core.med.text_transformer import LAYER_NORM_EPSILON, Attention, TextTransformer
from blip_core.med.weights import read_torch, read_weights

Weights = dict[str, Tensor]

IMAGE_FILES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
# what classifies, above the features
IMAGE_HEADS = ("head", "head_dist", "pre_logits.fc")
NEW_WORDS = 2  # [DEC] and [ENC], the last of the vocabulary

TEXT_FACTS = (
    "the width (med.text_width)",
    "the depth (med.text_depth)",
    "the number of heads (med.text_heads)",
    "the feed-forward's width",
    "the activation",
    "LayerNorm's epsilon",
    "the number of positions",
    "the number of words, [DEC] and [ENC] not counted (tokenizer.source)",
)


def initialise(med: MED, config: MEDConfig) -> None:
    """Fills a fresh MED's transformers with the pre-trained weights that the configuration names, if it names any.

    Raises CheckpointError, naming what was found and what the model needs, where they cannot be read or do not fit.
    """
    if config.image_weights:
        load_image_weights(med.image_encoder, config.image_weights)
    if config.text_weights:
        load_text_weights(med.text, config.text_weights)


def load_image_weights(encoder: ImageEncoder, source: str) -> None:
    """Fills the image encoder with a pre-trained ViT; positions are interpolated to the encoder's image size.

    Args:
        source: a name that timm knows, or a local file: .safetensors, .pth, .pt or .bin (timm's names of weights,
            bare or under 'model' or 'state_dict'), or .npz of the original release. A classifier is left out.
            A file says nothing of its number of heads, which must be the configuration's.

    Raises CheckpointError where it cannot be read, has other sizes, or is another kind of model.
    """
    vit = encoder.vit
    if Path(source).is_file() or source.endswith(IMAGE_FILES):
        weights = _read_npz(source, vit) if source.endswith(".npz") else _read_file(Path(source))
    else:
        weights = _read_timm(source, vit)
    weights = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] not in IMAGE_HEADS}
    _check_vit(source, weights, vit)
    weights["pos_embed"] = resize_positions(weights["pos_embed"], vit.patch_embed.grid_size[0])
    _check_same(source, {name: tuple(tensor.shape) for name, tensor in weights.items()}, vit)
    vit.load_state_dict(weights)


def load_text_weights(text: TextTransformer, source: str) -> None:
    """Fills the text transformer with a pre-trained BERT: words, positions, feed-forward and language model head.

    Every face gets BERT's self-attention. Cross-attention and the rows of [DEC] and [ENC], the last two words, stay
    as they are. BERT's token types, of which BLIP has none, its pooler and its next-sentence head are left out.

    Args:
        source: a name of a BERT on the hub, or a folder as save_pretrained writes it.

    Raises CheckpointError where it cannot be read, has other sizes, or is another kind of model.
    """
    found = to_ours(f"text weights {source}", _read_bert(source, text), BERT, FACES)
    own = dict(text.named_parameters(prefix="text"))
    with torch.no_grad():
        for name in found.keys() & own.keys():
            _, tensor = found[name]
            # the vocabulary's last rows, [DEC] and [ENC], are not BERT's
            own[name][: len(tensor)] = tensor


def _read_timm(name: str, vit: VisionTransformer) -> Weights:
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"image weights {name}: timm cannot load them ({first_line(error)}); "
            f"expected the name of a pre-trained ViT, or, without network, a local file ({', '.join(IMAGE_FILES)})"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise CheckpointError(f"image weights {name}: a {type(model).__name__}; expected a VisionTransformer")
    _check_facts(f"image weights {name}", _vit_facts(model), _vit_facts(vit))
    return model.state_dict()


def _vit_facts(vit: VisionTransformer) -> dict[str, object]:
    """What the weights do not show."""
    block = cast(Any, vit.blocks)[0]
    return {
        "the number of heads (med.image_heads)": block.attn.num_heads,
        "the activation": type(block.mlp.act).__name__,
        "LayerNorm's epsilon": block.norm1.eps,
    }


def _read_file(path: Path) -> Weights:
    """The state dict of a safetensors file, or of a torch file, bare or as those who train ViTs nest it."""
    if not path.is_file():
        raise CheckpointError(f"image weights {path}: not found; expected a local file, or the name of a ViT of timm")
    if path.suffix == ".safetensors":
        return read_weights([path])
    saved = read_torch(path)
    for key in ("model", "state_dict"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict) or not all(isinstance(tensor, Tensor) for tensor in saved.values()):
        raise CheckpointError(f"image weights {path}: no state dict, neither bare nor under 'model' or 'state_dict'")
    return saved


def _read_npz(source: str, vit: VisionTransformer) -> Weights:
    """The weights of a JAX release, through a ViT of the sizes that the file has."""
    try:
        with np.load(source) as arrays:
            shapes = {name: arrays[name].shape for name in arrays.files}
        patch, _, _, width = shapes["embedding/kernel"]
        _, tokens, _ = shapes["Transformer/posembed_input/pos_embedding"]
        query = "MultiHeadDotProductAttention_1/query/kernel"
        heads = shapes[f"Transformer/encoderblock_0/{query}"][1]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"image weights {source}: not a ViT of the JAX releases, or torn ({first_line(error)})"
        ) from error
    theirs = VisionTransformer(
        img_size=patch * math.isqrt(tokens - 1),
        patch_size=patch,
        embed_dim=width,
        depth=sum(name.endswith(query) for name in shapes),
        num_heads=heads,
        num_classes=0,
        global_pool="",
    )
    theirs.load_pretrained(source)
    _check_facts(f"image weights {source}", _vit_facts(theirs), _vit_facts(vit))
    return theirs.state_dict()


def _check_vit(source: str, weights: Weights, vit: VisionTransformer) -> None:
    """Raises CheckpointError where the weights are not those of a plain ViT of the same patches, width and depth."""
    own = vit.state_dict()
    if missing := sorted(own.keys() - weights.keys() - _of_blocks(own)):
        raise CheckpointError(
            f"image weights {source}: no {missing[0]}; expected a plain ViT: [CLS], learnt positions, a last norm"
        )
    _check_facts(f"image weights {source}", _vit_sizes(weights), _vit_sizes(own))
    tokens = weights["pos_embed"].shape[1]
    if tokens != 1 + math.isqrt(tokens - 1) ** 2:
        raise CheckpointError(
            f"image weights {source}: {tokens} positions; expected those of [CLS] and of a square of patches"
        )


def _vit_sizes(weights: Mapping[str, Tensor]) -> dict[str, object]:
    kernel = tuple(weights["patch_embed.proj.weight"].shape)
    return {
        "the shape of a patch (channels, height, width; med.patch_size)": kernel[1:],
        "the width (med.image_width)": kernel[0],
        "the depth (med.image_depth)": len({name.split(".")[1] for name in _of_blocks(weights)}),
    }


def _of_blocks(weights: Mapping[str, Tensor]) -> set[str]:
    return {name for name in weights if name.startswith("blocks.")}


def _check_same(source: str, found: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"image weights {source}: {len(missing)} are missing, the first is {missing[0]}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"image weights {source}: {len(unknown)} are unknown to a plain ViT, the first is {unknown[0]}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"image weights {source}: {name} has shape {found[name]}, expected {shape}")


def _read_bert(source: str, text: TextTransformer) -> Weights:
    origin = f"text weights {source}"
    try:
        with _quiet_transformers():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            if not isinstance(config, BertConfig) or config.model_type != "bert":
                raise CheckpointError(f"{origin}: a model of type {config.model_type!r}; expected a BERT")
            _check_facts(origin, _bert_facts(config), _text_facts(text))
            loaded: Any = BertForMaskedLM.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(
            f"{origin}: cannot be loaded ({first_line(error)}); expected the name of a BERT on the hub, "
            "or, without network, a folder as save_pretrained writes it"
        ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{origin}: {len(missing)} weights are missing, the first is {missing[0]}; "
            "expected a BERT with its language model head (BertForMaskedLM or BertForPreTraining)"
        )
    return model.state_dict() | dict.fromkeys(report["unexpected_keys"], torch.empty(0))


def _bert_facts(config: BertConfig) -> dict[str, object]:
    facts = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.hidden_act,
        config.layer_norm_eps,
        config.max_position_embeddings,
        config.vocab_size,
    )
    return dict(zip(TEXT_FACTS, facts, strict=True))


def _text_facts(text: TextTransformer) -> dict[str, object]:
    layer = text.layers[0]
    facts = (
        text.width,
        len(text.layers),
        cast(Attention, layer.self_attention[text.faces[0]]).heads,
        layer.feed_forward.expand.out_features,
        "gelu",
        LAYER_NORM_EPSILON,
        text.positions.num_embeddings,
        text.words.num_embeddings - NEW_WORDS,
    )
    return dict(zip(TEXT_FACTS, facts, strict=True))


def _check_facts(origin: str, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    wrong = [
        f"{fact} is {found[fact]}, expected {expected[fact]}" for fact in expected if found[fact] != expected[fact]
    ]
    if wrong:
        raise CheckpointError(f"{origin}: {'; '.join(wrong)}")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' report of the weights that it left out: that is checked, and said, here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
