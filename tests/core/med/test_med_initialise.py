"""Pre-trained encoders: a MED that begins with timm's ViT and transformers' BERT computes what they compute."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertLMHeadModel, BertModel, RobertaConfig

from blip_core.errors import CheckpointError
from blip_core.med.architecture import Architecture, Face, MEDConfig
from blip_core.med.image_encoder import resize_positions
from blip_core.med.initialise import initialise, load_image_weights, load_text_weights
from blip_core.med.med import MED, build_image_encoder, build_med
from blip_core.med.tokenizer import Tokenizer

TEXTS = ["a red circle", "two green rings under a yellow star"]


def _vit(**changes: Any) -> VisionTransformer:
    """timm's own, of the tests' sizes and with a classifier, no two weights of it alike."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(5)
    vit = VisionTransformer(**(sizes | changes))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vit.eval()


def _bert(tokenizer: Tokenizer, **changes: Any) -> BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return BertConfig(**({"vocab_size": len(tokenizer) - 2} | sizes | changes))


@pytest.fixture
def bert(tokenizer: Tokenizer) -> BertForPreTraining:
    """transformers' own, of the tests' sizes, no two weights of it alike."""
    torch.manual_seed(6)
    model = BertForPreTraining(_bert(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def bert_folder(bert: BertForPreTraining, tmp_path: Path) -> str:
    bert.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def _npz(vit: VisionTransformer, path: Path) -> None:
    """The names and shapes of the JAX releases."""
    weights = {name: tensor.detach().numpy() for name, tensor in vit.state_dict().items()}
    arrays = {
        "cls": weights["cls_token"],
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    for index, block in enumerate(vit.blocks):
        own = {name: tensor.detach().numpy() for name, tensor in block.state_dict().items()}
        heads, root = block.attn.num_heads, f"Transformer/encoderblock_{index}"
        attention = f"{root}/MultiHeadDotProductAttention_1"
        for place, part in enumerate(("query", "key", "value")):
            kernel, bias = (own[f"attn.qkv.{kind}"].reshape(3, vit.embed_dim, -1)[place] for kind in ("weight", "bias"))
            arrays[f"{attention}/{part}/kernel"] = kernel.T.reshape(vit.embed_dim, heads, -1)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = own["attn.proj.weight"].T.reshape(heads, -1, vit.embed_dim)
        arrays[f"{attention}/out/bias"] = own["attn.proj.bias"]
        for theirs, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            arrays[f"{root}/{theirs}/scale"], arrays[f"{root}/{theirs}/bias"] = (
                own[f"{ours}.weight"],
                own[f"{ours}.bias"],
            )
        for theirs, ours in (("Dense_0", "mlp.fc1"), ("Dense_1", "mlp.fc2")):
            arrays[f"{root}/MlpBlock_3/{theirs}/kernel"] = own[f"{ours}.weight"].T
            arrays[f"{root}/MlpBlock_3/{theirs}/bias"] = own[f"{ours}.bias"]
    np.savez(path, **arrays)


def _published(vit: VisionTransformer, folder: Path) -> str:
    """A name that timm loads a model by; `local-dir:` needs no network."""
    own = {"img_size": vit.patch_embed.img_size[0], "patch_size": vit.patch_embed.patch_size[0]}
    own |= {"embed_dim": vit.embed_dim, "depth": len(vit.blocks), "num_heads": vit.blocks[0].attn.num_heads}
    vit.pretrained_cfg = {"architecture": "vit_base_patch16_224", "input_size": (3, own["img_size"], own["img_size"])}
    save_for_hf(vit, folder, model_config={"architecture": "vit_base_patch16_224"}, model_args=own)
    return f"local-dir:{folder}"


SAVED: dict[str, Callable[[VisionTransformer, Path], str]] = {
    "safetensors": lambda vit, folder: _written(
        folder / "vit.safetensors", lambda path: save_file(vit.state_dict(), path)
    ),
    "pth": lambda vit, folder: _written(folder / "vit.pth", lambda path: torch.save(vit.state_dict(), path)),
    "bin": lambda vit, folder: _written(folder / "vit.bin", lambda path: torch.save({"model": vit.state_dict()}, path)),
    "pt": lambda vit, folder: _written(
        folder / "vit.pt", lambda path: torch.save({"epoch": 3, "state_dict": vit.state_dict()}, path)
    ),
    "npz": lambda vit, folder: _written(folder / "vit.npz", lambda path: _npz(vit, path)),
    "name": lambda vit, folder: _published(vit, folder / "published"),
}


def _written(path: Path, write: Callable[[Path], Any]) -> str:
    write(path)
    return str(path)


@pytest.mark.parametrize("kind", SAVED)
def test_the_image_encoder_computes_timm_s_features(
    kind: str, architecture: Architecture, images: Tensor, tmp_path: Path
) -> None:
    vit = _vit(depth=2)
    encoder = build_image_encoder(replace(architecture, image_depth=2)).eval()
    load_image_weights(encoder, SAVED[kind](vit, tmp_path))
    with torch.no_grad():
        assert torch.allclose(encoder(images), vit.forward_features(images), atol=1e-5)


@pytest.mark.parametrize("size", [24, 40, 16])
def test_positions_are_interpolated_to_another_image_size(
    size: int, architecture: Architecture, tmp_path: Path
) -> None:
    vit = _vit(img_size=32)
    encoder = build_image_encoder(replace(architecture, image_size=size)).eval()
    load_image_weights(encoder, SAVED["safetensors"](vit, tmp_path))
    positions, own, n = vit.pos_embed.detach(), encoder.vit.pos_embed.detach(), size // 8
    # salesforce/BLIP, models/vit.py, interpolate_pos_embed
    grid = positions[:, 1:].reshape(-1, 4, 4, 32).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(n, n), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(own[:, :1], positions[:, :1])
    assert torch.allclose(own[:, 1:], wanted, atol=1e-6)
    apart = {"pos_embed", "head.weight", "head.bias"}
    theirs = {name: tensor for name, tensor in vit.state_dict().items() if name not in apart}
    assert all(torch.equal(encoder.vit.state_dict()[name], tensor) for name, tensor in theirs.items())


def test_positions_of_the_same_size_stay_bit_for_bit() -> None:
    positions = torch.randn(1, 10, 4)
    assert torch.equal(resize_positions(positions, 3), positions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 4}, r"the shape of a patch \(.*med\.patch_size\) is \(3, 4, 4\), expected \(3, 8, 8\)"),
        ({"in_chans": 1}, r"is \(1, 8, 8\), expected \(3, 8, 8\)"),
        (
            {"embed_dim": 64, "depth": 2},
            r"med\.image_width\) is 64, expected 32; the depth \(.*_depth\) is 2, expected 1",
        ),
        (
            {"class_token": False, "global_pool": "avg", "fc_norm": False},
            r"no cls_token; expected a plain ViT: \[CLS\]",
        ),
        ({"global_pool": "avg"}, "no norm.bias; expected a plain ViT: .* a last norm"),
        ({"no_embed_class": True}, r"4 positions; expected those of \[CLS\] and of a square of patches"),
        ({"img_size": (16, 24)}, "7 positions; expected"),
        ({"mlp_ratio": 2}, r"blocks\.0\.mlp\.fc1\.weight has shape \(64, 32\), expected \(128, 32\)"),
        ({"init_values": 0.1}, r"2 are unknown to a plain ViT, the first is blocks\.0\.ls1\.gamma"),
        ({"qkv_bias": False}, r"1 are missing, the first is blocks\.0\.attn\.qkv\.bias"),
        ({"pre_norm": True}, r"no patch_embed\.proj\.bias; expected a plain ViT"),
    ],
)
def test_another_kind_of_vit_is_refused_by_what_differs(
    changes: dict[str, Any], message: str, architecture: Architecture, tmp_path: Path
) -> None:
    source = SAVED["safetensors"](_vit(**changes), tmp_path)
    with pytest.raises(CheckpointError, match=rf"image weights .*vit\.safetensors: .*{message}"):
        load_image_weights(build_image_encoder(architecture), source)


@pytest.mark.parametrize("kind", ["npz", "name"])
def test_another_number_of_heads_is_refused_where_it_can_be_known(
    kind: str, architecture: Architecture, tmp_path: Path
) -> None:
    source = SAVED[kind](_vit(num_heads=4), tmp_path)
    with pytest.raises(CheckpointError, match=r"the number of heads \(med\.image_heads\) is 4, expected 2"):
        load_image_weights(build_image_encoder(architecture), source)


def test_a_model_of_timm_that_is_no_vit_is_refused(architecture: Architecture, tmp_path: Path) -> None:
    other = timm.create_model("resnet10t", num_classes=0)
    save_for_hf(other, tmp_path / "resnet", model_config={"architecture": "resnet10t"})
    with pytest.raises(CheckpointError, match="a ResNet; expected a VisionTransformer"):
        load_image_weights(build_image_encoder(architecture), f"local-dir:{tmp_path / 'resnet'}")


def test_a_name_that_cannot_be_fetched_says_what_else_to_give(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("vit_nowhere", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"):
        with pytest.raises(
            CheckpointError, match=rf"image weights {name}: timm cannot load .* or, without network, a loc"
        ):
            load_image_weights(build_image_encoder(architecture), name)


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the checkpoint ran code')",)


def _torch_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("code.pth", _torch_file({"model": Code()}), "holds pickled code .*, which is not run"),
        ("text.pth", b"no checkpoint at all", "not a torch file"),
        ("empty.bin", b"", "not a torch file"),
        ("torn.safetensors", b"\x10\0\0\0\0\0\0\0{", "not a whole safetensors file"),
        ("torn.npz", b"PK\x03\x04", "not a ViT of the JAX releases, or torn"),
        ("text.npz", b"hello", "not a ViT of the JAX releases, or torn"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_and_never_run(
    name: str, content: bytes, message: str, architecture: Architecture, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
        load_image_weights(build_image_encoder(architecture), str(tmp_path / name))


def test_other_contents_of_a_torch_file_are_named(architecture: Architecture, tmp_path: Path) -> None:
    encoder = build_image_encoder(architecture)
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: not found"):
        load_image_weights(encoder, str(tmp_path / "nowhere.pth"))
    torch.save({"weights": _vit().state_dict()}, tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match=r"nested\.pth: no state dict, neither bare nor under 'model'"):
        load_image_weights(encoder, str(tmp_path / "nested.pth"))
    np.savez(tmp_path / "other.npz", cls=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"other\.npz: not a ViT of the JAX releases"):
        load_image_weights(encoder, str(tmp_path / "other.npz"))


@torch.no_grad()
def test_the_text_encoder_computes_bert_s_hidden_states_without_token_types(
    med: MED, tokenizer: Tokenizer, bert_folder: str
) -> None:
    load_text_weights(med.text, bert_folder)
    ids, mask = tokenizer(TEXTS)
    assert not mask.all()
    theirs = BertModel.from_pretrained(bert_folder).eval()
    typed = theirs(ids, attention_mask=mask.long()).last_hidden_state
    theirs.embeddings.token_type_embeddings.weight.zero_()
    hidden = theirs(ids, attention_mask=mask.long()).last_hidden_state
    ours = med.text(ids, mask, "encoder")
    assert torch.allclose(ours[mask], hidden[mask], atol=1e-5)
    assert not torch.allclose(ours[mask], typed[mask], atol=1e-2)


@torch.no_grad()
def test_the_text_decoder_computes_bert_s_next_words(med: MED, tokenizer: Tokenizer, bert_folder: str) -> None:
    load_text_weights(med.text, bert_folder)
    ids, mask = tokenizer(TEXTS)
    theirs = BertLMHeadModel.from_pretrained(bert_folder, is_decoder=True).eval()
    theirs.bert.embeddings.token_type_embeddings.weight.zero_()
    logits = theirs(ids, attention_mask=mask.long()).logits
    ours = med.text.predict(med.text(ids, mask, "decoder"))
    assert torch.allclose(ours[mask][:, :-2], logits[mask], atol=1e-4)


@torch.no_grad()
def test_cross_attention_new_words_and_heads_stay_fresh(med: MED, bert_folder: str) -> None:
    before = {name: parameter.clone() for name, parameter in med.named_parameters()}
    load_text_weights(med.text, bert_folder)
    changed = {name for name, parameter in med.named_parameters() if not torch.equal(parameter, before[name])}
    parts = [f"{part}.{kind}" for part in ("query", "key", "value", "output", "norm") for kind in ("weight", "bias")]
    fresh = {f"layers.{layer}.cross_attention.{part}" for layer in (0, 1) for part in parts}
    assert changed == {f"text.{name}" for name, _ in med.text.named_parameters() if name not in fresh}
    assert torch.equal(med.text.words.weight[-2:], before["text.words.weight"][-2:])
    assert torch.equal(med.text.head_bias[-2:], before["text.head_bias"][-2:])
    assert {med.decode_id, med.encode_id} == {len(med.text.head_bias) - 2, len(med.text.head_bias) - 1}


@pytest.mark.parametrize("face", ["encoder", "decoder"])
def test_a_model_of_one_face_takes_what_it_has(
    face: Face, architecture: Architecture, med: MED, tokenizer: Tokenizer, bert_folder: str
) -> None:
    part = build_med(architecture, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id, (face,)).eval()
    load_text_weights(part.text, bert_folder)
    load_text_weights(med.text, bert_folder)
    ids, mask = tokenizer(TEXTS)
    assert torch.equal(part.text(ids, mask, face), med.text(ids, mask, face))


@torch.no_grad()
def test_older_names_of_bert_s_norms_are_read(med: MED, bert: BertForPreTraining, bert_folder: str) -> None:
    path = Path(bert_folder) / "model.safetensors"
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(older, path, metadata={"format": "pt"})
    load_text_weights(med.text, bert_folder)
    assert torch.equal(med.text.norm.weight, bert.bert.embeddings.LayerNorm.weight)
    assert torch.equal(med.text.head_norm.bias, bert.cls.predictions.transform.LayerNorm.bias)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"the width \(med\.text_width\) is 64, expected 32"),
        ({"num_hidden_layers": 3}, r"the depth \(med\.text_depth\) is 3, expected 2"),
        ({"num_attention_heads": 4}, r"the number of heads \(med\.text_heads\) is 4, expected 2"),
        ({"intermediate_size": 64}, "the feed-forward's width is 64, expected 128"),
        ({"hidden_act": "relu"}, "the activation is relu, expected gelu"),
        ({"layer_norm_eps": 1e-5}, "LayerNorm's epsilon is 1e-05, expected 1e-12"),
        ({"max_position_embeddings": 128}, "the number of positions is 128, expected 512"),
        ({"vocab_size": 7}, r"the number of words, .*\(tokenizer\.source\) is 7, expected \d+"),
    ],
)
def test_a_bert_of_other_sizes_is_refused_by_what_differs(
    changes: dict[str, Any], message: str, med: MED, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    BertForMaskedLM(_bert(tokenizer, **changes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"text weights {tmp_path}: {message}"):
        load_text_weights(med.text, str(tmp_path))


def test_what_is_no_bert_is_refused(med: MED, tokenizer: Tokenizer, bert_folder: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: cannot be loaded .* or, without network, a folder"):
        load_text_weights(med.text, str(tmp_path / "nowhere"))
    RobertaConfig().save_pretrained(tmp_path / "roberta")
    with pytest.raises(CheckpointError, match="a model of type 'roberta'; expected a BERT"):
        load_text_weights(med.text, str(tmp_path / "roberta"))
    BertModel(_bert(tokenizer)).save_pretrained(tmp_path / "headless")
    with pytest.raises(CheckpointError, match=r"6 weights are missing, .*expected a BERT with its language model head"):
        load_text_weights(med.text, str(tmp_path / "headless"))
    path = Path(bert_folder) / "model.safetensors"
    whole = load_file(path)
    save_file({**whole, "bert.adapter.weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are unknown, the first is bert\.adapter\.weight"):
        load_text_weights(med.text, bert_folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_text_weights(med.text, bert_folder)


def test_the_configuration_says_what_a_model_begins_with(
    med: MED, architecture: Architecture, tokenizer: Tokenizer, images: Tensor, bert_folder: str, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in med.state_dict().items()}
    initialise(med, MEDConfig("tiny"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in med.state_dict().items())
    initialise(med, MEDConfig("tiny", image_weights=SAVED["pth"](_vit(), tmp_path), text_weights=bert_folder))
    other = build_med(architecture, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id)
    load_image_weights(other.image_encoder, str(tmp_path / "vit.pth"))
    load_text_weights(other.text, bert_folder)
    ids, mask = tokenizer(TEXTS)
    with torch.no_grad():
        assert torch.equal(med.encode_image(images), other.eval().encode_image(images))
        assert torch.equal(med.text(ids, mask, "decoder"), other.text(ids, mask, "decoder"))
