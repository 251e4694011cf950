"""BLIP checkpoints of others: transformers' folders, here or on the hub, and the original release's files.

What comes out are weights under our names and the sizes that they have. The faces are those whose weights are there:
a captioning checkpoint has the decoder, a retrieval or ITM one the encoder, a pre-trained one both.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import BlipConfig

from blip_core.errors import CheckpointError
from blip_core.med.architecture import PRESETS, Architecture, Face
from blip_core.med.med import INITIAL_TEMPERATURE
from blip_core.med.names import NameTable, to_ours
from blip_core.med.release_names import RELEASE
from blip_core.med.sources import find_weights, standing_digest
from blip_core.med.text_transformer import LAYER_NORM_EPSILON
from blip_core.med.transformers_names import TRANSFORMERS
from blip_core.med.weights import read_weights
from blip_core.med.word_pieces import DECODE, ENCODE, END, FILES

RELEASE_TOKENIZER = "bert-base-uncased"
RELEASE_HEAD_WIDTH = 64  # of ViT-B, ViT-L and BERT-base; the files do not record the number of heads
LARGE_WIDTH = 1024
LARGE_DROP_PATH = 0.1  # the official code trains ViT-L with it always, ViT-B without
DROPOUT = 0.1
POSITIONS = 512


class Stored(NamedTuple):
    """A checkpoint on disk.

    Attributes:
        origin: where the weights lie, for messages.
        format: what wrote it, in words.
        weights: by our names; each with the name that it has there, for messages.
        tokenizer: a folder with one, or a name; None where the checkpoint brings none.
        tokens: ids of special tokens that the tokenizer must agree with.
    """

    origin: Path
    format: str
    architecture: Architecture
    faces: tuple[Face, ...]
    vocabulary: int
    weights: dict[str, tuple[str, Tensor]]
    digest: str
    tokenizer: str | Path | None
    tokens: dict[str, int]


def read_transformers(folder: Path, values: Mapping[str, Any]) -> Stored:
    """A folder of BlipForConditionalGeneration or BlipForImageTextRetrieval, whose config.json holds `values`."""
    config = _blip_config(folder / "config.json", values)
    kind = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else ""
    if kind in ("BlipForQuestionAnswering", "BlipModel"):
        raise CheckpointError(
            f"{folder}: a {kind}, which has no counterpart here (BLIP's question answering is not supported, and "
            "BlipModel is no model of BLIP's); expected BlipForConditionalGeneration or BlipForImageTextRetrieval"
        )
    architecture = _architecture(folder / "config.json", config)
    files = find_weights(folder)
    if not files:
        raise CheckpointError(f"checkpoint {folder}: no weights; expected model.safetensors or pytorch_model.bin")
    weights = read_weights(files)
    origin = files[0] if len(files) == 1 else folder
    faces = _known_faces(origin, weights, TRANSFORMERS)
    depths = (architecture.image_depth, architecture.text_depth)
    if (found := TRANSFORMERS.depths(weights, faces)) != depths:
        raise CheckpointError(
            f"{origin}: has layers (image, text) {found}; config.json promises {depths} (num_hidden_layers)"
        )
    return Stored(
        origin=origin,
        format=f"transformers' {kind or 'BLIP'}",
        architecture=architecture,
        faces=faces,
        vocabulary=config.text_config.vocab_size,
        weights=_with_temperature(to_ours(origin, weights, TRANSFORMERS, faces), faces),
        digest=standing_digest(files),
        tokenizer=folder if any((folder / name).is_file() for name in FILES) else None,
        tokens={DECODE: config.text_config.bos_token_id, END: config.text_config.sep_token_id},
    )


def _blip_config(path: Path, values: Mapping[str, Any]) -> Any:
    try:
        return BlipConfig.from_dict(dict(values))
    except (StrictDataclassError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path}: does not describe a BLIP ({' '.join(str(error).split())})") from error


def _architecture(path: Path, config: Any) -> Architecture:
    """The sizes of a BlipConfig. Raises CheckpointError, naming the key, for what a MED cannot be."""
    vision, text = config.vision_config, config.text_config
    facts: list[tuple[str, object, tuple[object, ...]]] = [
        ("vision_config.hidden_act", vision.hidden_act, ("gelu",)),
        # 1e-5 is transformers' default; the published weights were trained with 1e-6
        ("vision_config.layer_norm_eps", vision.layer_norm_eps, (1e-6, 1e-5)),
        ("vision_config.intermediate_size", vision.intermediate_size, (4 * vision.hidden_size,)),
        ("text_config.hidden_act", text.hidden_act, ("gelu",)),
        ("text_config.layer_norm_eps", text.layer_norm_eps, (LAYER_NORM_EPSILON,)),
        ("text_config.intermediate_size", text.intermediate_size, (4 * text.hidden_size,)),
        ("text_config.max_position_embeddings", text.max_position_embeddings, (POSITIONS,)),
    ]
    for key, found, allowed in facts:
        if found not in allowed:
            raise CheckpointError(f"{path}: {key} is {found}, expected {' or '.join(map(str, allowed))}")
    _check_multiple(path, vision, "image_size", "patch_size")
    _check_multiple(path, vision, "hidden_size", "num_attention_heads")
    _check_multiple(path, text, "hidden_size", "num_attention_heads")
    return _sized(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        image_width=vision.hidden_size,
        image_depth=vision.num_hidden_layers,
        image_heads=vision.num_attention_heads,
        text_width=text.hidden_size,
        text_depth=text.num_hidden_layers,
        text_heads=text.num_attention_heads,
        projection=config.image_text_hidden_size,
    )


def _check_multiple(path: Path, part: Any, multiple: str, divisor: str) -> None:
    whole, share = getattr(part, multiple), getattr(part, divisor)
    if not (isinstance(whole, int) and isinstance(share, int) and share > 0 and whole > 0 and whole % share == 0):
        raise CheckpointError(
            f"{path}: {part.base_config_key}.{multiple} is {whole}, expected a multiple of its {divisor} {share}"
        )


def read_release(path: Path) -> Stored:
    """A file of the original release: pre-trained, captioning, retrieval or ITM. The sizes are those of its weights."""
    weights = read_weights([path])
    faces = _known_faces(path, weights, RELEASE)
    ours = to_ours(path, weights, RELEASE, faces)
    architecture = _release_architecture(path, ours, RELEASE.depths(weights, faces))
    vocabulary = len(ours["text.words.weight"][1])
    kinds = {("encoder",): "retrieval or ITM", ("decoder",): "captioning", ("encoder", "decoder"): "pre-trained"}
    return Stored(
        origin=path,
        format=f"the original release ({kinds[faces]})",
        architecture=architecture,
        faces=faces,
        vocabulary=vocabulary,
        weights=_with_temperature(ours, faces),
        digest=standing_digest([path]),
        tokenizer=RELEASE_TOKENIZER,
        tokens={DECODE: vocabulary - 2, ENCODE: vocabulary - 1},
    )


def _release_architecture(
    path: Path, weights: Mapping[str, tuple[str, Tensor]], depths: tuple[int, int]
) -> Architecture:
    def shape(ours: str, axes: int) -> tuple[int, ...]:
        name, tensor = weights[ours]
        if tensor.dim() != axes:
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected one of {axes} axes")
        return tuple(tensor.shape)

    def heads(width: int) -> int:
        if width % RELEASE_HEAD_WIDTH:
            raise CheckpointError(
                f"{path}: a width of {width}; expected a multiple of {RELEASE_HEAD_WIDTH}, the width of a head in "
                "every model of the release"
            )
        return width // RELEASE_HEAD_WIDTH

    image_width, _, patch, _ = shape("image_encoder.vit.patch_embed.proj.weight", 4)
    positions, text_width = shape("image_encoder.vit.pos_embed", 3)[1], shape("text.words.weight", 2)[1]
    side = math.isqrt(positions - 1)
    if positions != 1 + side**2:
        raise CheckpointError(f"{path}: {positions} image positions; expected those of [CLS] and a square of patches")
    projected = "image_projection.weight"
    return _sized(
        image_size=side * patch,
        patch_size=patch,
        image_width=image_width,
        image_depth=depths[0],
        image_heads=heads(image_width),
        text_width=text_width,
        text_depth=depths[1],
        text_heads=heads(text_width),
        projection=shape(projected, 2)[0] if projected in weights else PRESETS["base"].projection,
    )


def _with_temperature(weights: dict[str, tuple[str, Tensor]], faces: tuple[Face, ...]) -> dict[str, tuple[str, Tensor]]:
    """With ITC's temperature in our shape; where a checkpoint with an encoder has none, with the initial one."""
    if "encoder" not in faces:
        return weights
    name, temperature = weights.get("temperature", ("temp", torch.tensor(INITIAL_TEMPERATURE)))
    return {**weights, "temperature": (name, temperature.reshape(-1))}


def _sized(**sizes: int) -> Architecture:
    """With the dropouts of the official code, which the checkpoints of others do not record."""
    drop_path = LARGE_DROP_PATH if sizes["image_width"] == LARGE_WIDTH else 0.0
    return Architecture(**sizes, drop_path=drop_path, dropout=DROPOUT)


def _known_faces(origin: Path, names: Collection[str], table: NameTable) -> tuple[Face, ...]:
    """The faces of a checkpoint. Raises CheckpointError for BLIP's models that a MED is not, and for all others."""
    faces = table.found_faces(names)
    if any(name.startswith("cls_head.") or ".crossattention.self0." in name for name in names):
        raise CheckpointError(f"{origin}: an NLVR2 checkpoint, which has two cross-attentions; that is not supported")
    if faces == ("encoder", "decoder") and not any(name.startswith("itm_head.") for name in names):
        raise CheckpointError(
            f"{origin}: a VQA checkpoint, whose text encoder and decoder are not tied; that is not supported"
        )
    if not faces:
        example = f", such as {min(names)}" if names else ""
        raise CheckpointError(
            f"{origin}: {len(names)} weights{example}, none of a BLIP; expected those below "
            f"{' or '.join(f'{root}.' for root in table.roots.values())}"
        )
    return faces
