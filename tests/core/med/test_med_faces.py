"""MED's faces: who looks at what, what they share, and which token they open with."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blip_core.errors import CheckpointError, ConfigError
from blip_core.med.architecture import PRESETS, Architecture, Face, MEDConfig, architecture_from
from blip_core.med.decoding import GenerationConfig
from blip_core.med.generation import CachedDecoder, greedy
from blip_core.med.med import MED, build_med
from blip_core.med.text_transformer import CrossKeys, DecoderCache, attention_mask
from blip_core.med.tokenizer import Tokenizer

CPU = torch.device("cpu")
TEXTS = ["a red circle", "two green rings under a yellow star"]


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


@pytest.fixture
def image(med: MED, images: Tensor) -> CrossKeys:
    """Of the first two images."""
    return med.cross_keys(med.encode_image(images[:2]))


def test_the_encoder_sees_everything_but_padding() -> None:
    assert attention_mask(3, 0, None, causal=False, device=CPU) is None
    allowed = attention_mask(3, 0, _mask("xxx", "xx."), causal=False, device=CPU)
    assert allowed is not None
    assert allowed.expand(2, 1, 3, 3)[:, 0].equal(torch.stack([_mask("xxx", "xxx", "xxx"), _mask("xx.", "xx.", "xx.")]))


def test_the_decoder_sees_what_stands_before_and_no_padding() -> None:
    allowed = attention_mask(3, 0, _mask("xxx", "xx."), causal=True, device=CPU)
    assert allowed is not None
    assert allowed[:, 0].equal(torch.stack([_mask("x..", "xx.", "xxx"), _mask("x..", "xx.", "xx.")]))


def test_new_tokens_see_the_cached_ones_and_their_own_place() -> None:
    allowed = attention_mask(2, 3, None, causal=True, device=CPU)
    assert allowed is not None
    assert allowed[0, 0].equal(_mask("xxxx.", "xxxxx"))
    assert attention_mask(1, 3, None, causal=True, device=CPU) is None


def test_a_padding_token_changes_nothing(med: MED, tokenizer: Tokenizer, image: CrossKeys) -> None:
    ids, mask = tokenizer(TEXTS)
    assert not mask[0].all()
    other = ids.masked_fill(~mask, 7)
    assert torch.allclose(med.embed_text(ids, mask), med.embed_text(other, mask), atol=1e-6)
    assert torch.allclose(med.match(image, ids, mask), med.match(image, other, mask), atol=1e-6)
    assert torch.allclose(med.decode(image, ids, mask)[mask], med.decode(image, other, mask)[mask], atol=1e-6)
    alone = tokenizer(TEXTS[:1])
    assert torch.allclose(med.embed_text(*alone), med.embed_text(ids, mask)[:1], atol=1e-6)


def test_the_decoder_does_not_look_ahead_and_the_encoder_does(med: MED, tokenizer: Tokenizer, image: CrossKeys) -> None:
    ids, mask = tokenizer(TEXTS[1:])
    first = image.select(slice(1))
    changed = ids.clone()
    changed[0, 4] = tokenizer(["circle"]).ids[0, 1]
    assert (changed != ids).sum() == 1
    before, after = med.decode(first, ids, mask), med.decode(first, changed, mask)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)
    assert not torch.allclose(med.embed_text(ids, mask), med.embed_text(changed, mask), atol=1e-4)


def test_only_the_grounded_faces_depend_on_the_image(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS)
    one, other = (med.cross_keys(med.encode_image(part)) for part in (images[:2], images[1:]))
    assert not torch.allclose(med.match(one, ids, mask), med.match(other, ids, mask), atol=1e-3)
    assert not torch.allclose(med.decode(one, ids, mask), med.decode(other, ids, mask), atol=1e-3)
    med.embed_text(ids, mask).sum().backward()
    reached = {name for name, parameter in med.named_parameters() if parameter.grad is not None}
    assert not any("cross_attention" in name or "image" in name for name in reached)


def test_every_patch_reaches_the_match(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS[:1])
    features = med.encode_image(images[:1]).detach().requires_grad_()
    assert features.shape == (1, 1 + 4, 32)
    med.match(med.cross_keys(features), ids, mask)[0, 1].backward()
    assert features.grad is not None
    assert (features.grad.abs().sum(dim=2) > 0).all()


def test_keys_of_a_selection_are_those_of_the_selected_images(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer([*TEXTS, "a blue square", "a red cross"])
    features = med.encode_image(images)
    rows = torch.tensor([2, 0, 2, 1])
    selected, passed = med.cross_keys(features).select(rows), med.cross_keys(features[rows])
    assert (len(selected), selected.device) == (4, ids.device)
    assert torch.allclose(med.match(selected, ids, mask), med.match(passed, ids, mask), atol=1e-5)
    assert torch.allclose(med.decode(selected, ids, mask), med.decode(passed, ids, mask), atol=1e-5)
    sliced = med.cross_keys(features).select(slice(1, 3))
    assert torch.allclose(
        med.match(sliced, ids[:2], mask[:2]), med.match(med.cross_keys(features[1:]), ids[:2], mask[:2])
    )


@torch.inference_mode()
def test_padding_of_image_features_is_never_looked_at(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS)
    features, image_mask = med.encode_image(images[:2]), _mask("xxxxx", "xxx..")
    assert not mask[0].all()
    image = med.cross_keys(features, image_mask)
    for row, kept in ((0, 5), (1, 3)):
        alone = med.cross_keys(features[row : row + 1, :kept])
        text, present = ids[row : row + 1, : mask[row].sum()], mask[row : row + 1, : mask[row].sum()]
        assert torch.allclose(med.match(image, ids, mask)[row], med.match(alone, text, present)[0], atol=1e-5)
        decoded = med.decode(image, ids, mask)[row, : mask[row].sum()]
        assert torch.allclose(decoded, med.decode(alone, text, present)[0], atol=1e-5)
    assert not torch.allclose(
        med.match(image, ids, mask)[1], med.match(med.cross_keys(features), ids, mask)[1], atol=1e-3
    )


@torch.inference_mode()
def test_padding_of_image_features_is_never_looked_at_in_cached_decoding(med: MED, images: Tensor) -> None:
    features, image_mask = med.encode_image(images[:2]), _mask("xxx..", "xxxxx")
    tokens = torch.tensor([[med.decode_id, 6, 7, 8], [med.decode_id, 9, 6, 5]])
    cache, alone = DecoderCache(med.cross_keys(features, image_mask)), DecoderCache(med.cross_keys(features[:1, :3]))
    for step in (tokens[:, :2], tokens[:, 2:3]):
        assert torch.allclose(med.decode_step(step, cache)[0], med.decode_step(step[:1], alone)[0], atol=1e-5)
    cache.select(torch.tensor([1, 0]))
    step = tokens[:, 3:]
    assert torch.allclose(med.decode_step(step.flip(0), cache)[1], med.decode_step(step[:1], alone)[0], atol=1e-5)


def test_encoder_and_decoder_share_all_but_self_attention(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS)
    features = med.encode_image(images[:2]).detach()

    def reached(output: Tensor) -> set[str]:
        med.zero_grad(set_to_none=True)
        output.square().sum().backward()
        return {name for name, parameter in med.text.named_parameters() if parameter.grad is not None}

    encoder = reached(med.match(med.cross_keys(features), ids, mask))
    decoder = reached(med.decode(med.cross_keys(features), ids, mask))
    parts = [f"{part}.{kind}" for part in ("query", "key", "value", "output", "norm") for kind in ("weight", "bias")]
    own = {
        face: {f"layers.{layer}.self_attention.{face}.{part}" for layer in range(2) for part in parts}
        for face in ("encoder", "decoder")
    }
    head = {f"head_{name}" for name in ("transform.weight", "transform.bias", "norm.weight", "norm.bias", "bias")}
    assert encoder - decoder == own["encoder"]
    assert decoder - encoder == own["decoder"] | head
    shared = encoder & decoder
    assert encoder | decoder == {name for name, _ in med.text.named_parameters()}
    # embeddings 4, and a layer's cross-attention 10 and feed-forward 6
    assert len(shared) == 4 + 2 * (10 + 6)


def test_the_first_token_is_replaced_by_the_face_s_own(med: MED, tokenizer: Tokenizer, image: CrossKeys) -> None:
    ids, mask = tokenizer(TEXTS)
    given = ids.clone()
    for face, first in ((med.match, tokenizer.encode_id), (med.decode, tokenizer.decode_id)):
        opened = torch.cat([torch.full((2, 1), first), ids[:, 1:]], dim=1)
        assert torch.equal(face(image, ids, mask), face(image, opened, mask))
    hidden = med.text(torch.cat([torch.full((2, 1), tokenizer.encode_id), ids[:, 1:]], dim=1), mask, "encoder", image)
    assert torch.allclose(med.match(image, ids, mask), med.itm_head(hidden[:, 0]))
    assert torch.equal(ids, given)


def test_match_can_leave_cls_in_its_place_as_the_official_scorer_does(
    med: MED, tokenizer: Tokenizer, image: CrossKeys
) -> None:
    ids, mask = tokenizer(TEXTS)
    started = med.itm_head(med.text(ids, mask, "encoder", image)[:, 0])
    assert torch.allclose(med.match(image, ids, mask, open_with_enc=False), started)
    assert not torch.allclose(med.match(image, ids, mask), started, atol=1e-3)


def test_embeddings_have_unit_length(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    text, image = med.embed_text(*tokenizer(TEXTS)), med.project_image(med.encode_image(images))
    assert text.shape == (2, 16)
    assert image.shape == (3, 16)
    assert torch.allclose(text.norm(dim=1), torch.ones(2))
    assert torch.allclose(image.norm(dim=1), torch.ones(3))


def _built(architecture: Architecture, tokenizer: Tokenizer, *faces: Face) -> MED:
    return build_med(architecture, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id, faces)


def test_a_model_has_only_what_its_faces_use(
    architecture: Architecture, med: MED, tokenizer: Tokenizer, image: CrossKeys
) -> None:
    ids, mask = tokenizer(TEXTS)
    writer, judge = _built(architecture, tokenizer, "decoder"), _built(architecture, tokenizer, "encoder")
    whole = med.state_dict()
    names = {model: set(model.state_dict()) for model in (writer, judge)}
    of_encoder = {name for name in whole if "self_attention.encoder" in name} | {
        *(
            f"{part}.{kind}"
            for part in ("image_projection", "text_projection", "itm_head")
            for kind in ("weight", "bias")
        ),
        "temperature",
    }
    assert whole.keys() - names[writer] == of_encoder
    assert whole.keys() - names[judge] == {
        name for name in whole if "self_attention.decoder" in name or "head_" in name
    } - {"itm_head.weight", "itm_head.bias"}
    for model in (writer, judge):
        assert not model.load_state_dict(whole, strict=False).missing_keys
    assert torch.equal(writer.eval().decode(image, ids, mask), med.decode(image, ids, mask))
    assert torch.equal(judge.eval().match(image, ids, mask), med.match(image, ids, mask))
    assert torch.equal(judge.embed_text(ids, mask), med.embed_text(ids, mask))
    assert (med.faces, writer.faces, judge.faces) == (("encoder", "decoder"), ("decoder",), ("encoder",))


def test_a_face_that_is_missing_is_named(
    architecture: Architecture, tokenizer: Tokenizer, images: Tensor, image: CrossKeys
) -> None:
    ids, mask = tokenizer(TEXTS)
    writer, judge = _built(architecture, tokenizer, "decoder"), _built(architecture, tokenizer, "encoder")
    for call in (
        lambda: writer.match(image, ids, mask),
        lambda: writer.embed_text(ids, mask),
        lambda: writer.project_image(writer.encode_image(images)),
    ):
        with pytest.raises(CheckpointError, match=r"no text encoder: it can write captions, not score texts; expected"):
            call()
    for call in (
        lambda: judge.decode(image, ids, mask),
        lambda: judge.decode_step(ids, DecoderCache(image)),
    ):
        with pytest.raises(CheckpointError, match=r"no text decoder: it can score texts, not write captions; expected"):
            call()


def _loss_and_gradients(med: MED, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    med.zero_grad(set_to_none=True)
    features = med.encode_image(images)
    image = med.cross_keys(features)
    parts = (
        med.match(image, ids, mask),
        med.decode(image, ids, mask)[mask],
        10 * med.project_image(features) @ med.embed_text(ids, mask).T,
    )
    loss = torch.stack([part.square().mean() for part in parts]).sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in med.named_parameters() if p.grad is not None}


def _agree(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> bool:
    pairs = [(one[0], other[0]), *((one[1][name], gradient) for name, gradient in other[1].items())]
    return one[1].keys() == other[1].keys() and all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def test_gradient_checkpointing_changes_no_loss_and_no_gradient(
    architecture: Architecture, tokenizer: Tokenizer, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = tokenizer([*TEXTS, "a blue square"])
    torch.manual_seed(0)
    med = _built(replace(architecture, dropout=0.2), tokenizer, "encoder", "decoder").train()
    kept = _loss_and_gradients(med, images, ids, mask)
    called = []
    for layer in (*med.text.layers, *med.image_encoder.vit.blocks):
        layer.register_forward_pre_hook(lambda layer, _: called.append(layer))
    med.set_gradient_checkpointing(True)
    assert _agree(kept, _loss_and_gradients(med, images, ids, mask))
    # three faces of two layers and an image layer, each computed forwards and again backwards
    assert len(called) == 2 * (3 * 2 + 1)
    med.eval()
    called.clear()
    _loss_and_gradients(med, images, ids, mask)
    assert sum(layer in called for layer in med.text.layers) == 2
    assert len([layer for layer in called if layer in set(med.text.layers)]) == 3 * 2
    med.train().set_gradient_checkpointing(False)
    assert _agree(kept, _loss_and_gradients(med, images, ids, mask))


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_give_the_same_and_keep_their_names(
    architecture: Architecture, tokenizer: Tokenizer, images: Tensor
) -> None:
    ids, mask = tokenizer([*TEXTS, "a blue square"])
    torch.manual_seed(0)
    med = _built(architecture, tokenizer, "encoder", "decoder").train()
    names, plain = list(med.state_dict()), _loss_and_gradients(med, images, ids, mask)

    def captions(length: int) -> list[list[int]]:
        config = GenerationConfig(method="greedy", max_length=length, min_length=length)
        with torch.inference_mode():
            decoder = CachedDecoder(med, med.cross_keys(med.encode_image(images)))
            found = greedy(decoder, [tokenizer.decode_id, 6], 3, tokenizer.end_id, config, CPU)
        return [caption.tokens for caption in found]

    short, long = captions(6), captions(16)
    med.compile_layers()
    assert list(med.state_dict()) == names
    assert _agree(plain, _loss_and_gradients(med, images, ids, mask))
    assert captions(6) == short
    with torch.compiler.set_stance("fail_on_recompile"):
        assert captions(16) == long


def test_settings_replace_a_preset_s_sizes() -> None:
    assert MEDConfig("base").architecture() == PRESETS["base"]
    assert MEDConfig("base", image_size=384, dropout=0.0).architecture() == architecture_from(
        {**vars(PRESETS["base"]), "image_size": 384, "dropout": 0.0}
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MEDConfig("base", image_heads=5), r"med\.image_width 768 must be a multiple of med\.image_heads 5"),
        (MEDConfig("base", text_width=770), r"med\.text_width 770 must be a multiple of med\.text_heads 12"),
        (MEDConfig("base", patch_size=15), r"med\.image_size 224 must be a multiple of med\.patch_size 15"),
    ],
)
def test_sizes_that_do_not_fit_are_named(config: MEDConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.architecture()


def test_recorded_sizes_must_be_complete() -> None:
    with pytest.raises(ConfigError, match="projection"):
        architecture_from({name: value for name, value in vars(PRESETS["tiny"]).items() if name != "projection"})
