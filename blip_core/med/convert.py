"""Checkpoints for others: transformers' BLIP classes, and files as the original release has them.

What either can hold is one face: a Captioner (BlipForConditionalGeneration, BLIP_Decoder) or a Filter
(BlipForImageTextRetrieval, BLIP_ITM). A MED with both faces can be written as the one or the other.
"""

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BlipConfig, BlipImageProcessor

from blip_core.errors import CheckpointError
from blip_core.files import atomic_file, atomic_folder
from blip_core.med.architecture import Face
from blip_core.med.checkpoint import LoadedMED
from blip_core.med.description import CONFIG
from blip_core.med.foreign import RELEASE_HEAD_WIDTH
from blip_core.med.lm import LABEL_SMOOTHING
from blip_core.med.names import NameTable, to_theirs
from blip_core.med.release_names import POSITION_IDS, RELEASE
from blip_core.med.sources import SAFETENSORS
from blip_core.med.text_transformer import LAYER_NORM_EPSILON
from blip_core.med.transformers_names import TRANSFORMERS

Kind = Literal["captioner", "filter"]
FACES: dict[Kind, Face] = {"captioner": "decoder", "filter": "encoder"}
CLASSES: dict[Kind, str] = {"captioner": "BlipForConditionalGeneration", "filter": "BlipForImageTextRetrieval"}
IMAGE_EPSILON = 1e-6  # of timm's ViT; transformers would take 1e-5 if nothing was said


def write_transformers(folder: Path, loaded: LoadedMED, kind: Kind) -> None:
    """Writes what transformers' `from_pretrained` reads: weights, config.json, image processor and tokenizer.

    Raises CheckpointError where the MED has not the face that the kind needs.
    """
    weights = _weights(loaded, kind, TRANSFORMERS)
    with atomic_folder(folder) as temporary:
        save_file(weights, temporary / SAFETENSORS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(_blip_config(loaded, kind).to_json_string(use_diff=False), encoding="utf-8")
        size = loaded.architecture.image_size
        BlipImageProcessor(size={"height": size, "width": size}).save_pretrained(temporary)
        loaded.tokenizer.save(temporary)


def write_release(path: Path, loaded: LoadedMED, kind: Kind) -> None:
    """Writes {"model": state dict} with the names of BLIP_Decoder or BLIP_ITM, as the original code loads it.

    The tokenizer has no place in it, and neither have numbers of heads: the original code takes one for each 64 of
    the width. Raises CheckpointError for a MED of other heads, or without the face that the kind needs.
    """
    sizes = loaded.architecture
    for part, width, heads in (
        ("image encoder", sizes.image_width, sizes.image_heads),
        ("text transformer", sizes.text_width, sizes.text_heads),
    ):
        if width != RELEASE_HEAD_WIDTH * heads:
            raise CheckpointError(
                f"the {part} has {heads} heads at a width of {width}; the release's files do not say how many there "
                f"are, so expected one for each {RELEASE_HEAD_WIDTH}, or another format"
            )
    weights = _weights(loaded, kind, RELEASE)
    positions = loaded.med.text.positions.num_embeddings
    root = RELEASE.roots[FACES[kind]]
    weights[POSITION_IDS.replace("T.", f"{root}.")] = torch.arange(positions)[None]
    with atomic_file(path) as temporary:
        torch.save({"model": weights}, temporary)


def _weights(loaded: LoadedMED, kind: Kind, table: NameTable) -> dict[str, Tensor]:
    face = FACES[kind]
    loaded.med.require(face)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in loaded.med.state_dict().items()}
    return to_theirs(own, table, face, loaded.architecture.image_depth, loaded.architecture.text_depth)


def _blip_config(loaded: LoadedMED, kind: Kind) -> BlipConfig:
    sizes, tokenizer = loaded.architecture, loaded.tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.text_width,
        "encoder_hidden_size": sizes.image_width,
        "intermediate_size": 4 * sizes.text_width,
        "num_hidden_layers": sizes.text_depth,
        "num_attention_heads": sizes.text_heads,
        "max_position_embeddings": loaded.med.text.positions.num_embeddings,
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "hidden_dropout_prob": sizes.dropout,
        "attention_probs_dropout_prob": sizes.dropout,
        "label_smoothing": LABEL_SMOOTHING,
        "bos_token_id": tokenizer.decode_id,
        "eos_token_id": tokenizer.end_id,
        "sep_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    vision = {
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_size": sizes.image_width,
        "intermediate_size": 4 * sizes.image_width,
        "num_hidden_layers": sizes.image_depth,
        "num_attention_heads": sizes.image_heads,
        "layer_norm_eps": IMAGE_EPSILON,
    }
    return BlipConfig(
        text_config=text,
        vision_config=vision,
        image_text_hidden_size=sizes.projection,
        label_smoothing=LABEL_SMOOTHING,
        architectures=[CLASSES[kind]],
    )
