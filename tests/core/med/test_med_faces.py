"""MED's faces: who looks at what, what they share, and which token they open with."""

import pytest
import torch
from torch import Tensor

from blip_core.errors import ConfigError
from blip_core.med.med import MED, PRESETS, MEDConfig, architecture_from
from blip_core.med.text_transformer import attention_mask
from blip_core.med.tokenizer import Tokenizer

CPU = torch.device("cpu")
TEXTS = ["a red circle", "two green rings under a yellow star"]


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


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


def test_a_padding_token_changes_nothing(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS)
    assert not mask[0].all()
    other = ids.masked_fill(~mask, 7)
    features = med.encode_image(images[:2])
    assert torch.allclose(med.embed_text(ids, mask), med.embed_text(other, mask), atol=1e-6)
    assert torch.allclose(med.match(features, ids, mask), med.match(features, other, mask), atol=1e-6)
    assert torch.allclose(med.decode(features, ids, mask)[mask], med.decode(features, other, mask)[mask], atol=1e-6)
    alone = tokenizer(TEXTS[:1])
    assert torch.allclose(med.embed_text(*alone), med.embed_text(ids, mask)[:1], atol=1e-6)


def test_the_decoder_does_not_look_ahead_and_the_encoder_does(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS[1:])
    features = med.encode_image(images[:1])
    changed = ids.clone()
    changed[0, 4] = tokenizer(["circle"]).ids[0, 1]
    assert (changed != ids).sum() == 1
    before, after = med.decode(features, ids, mask), med.decode(features, changed, mask)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)
    assert not torch.allclose(med.embed_text(ids, mask), med.embed_text(changed, mask), atol=1e-4)


def test_only_the_grounded_faces_depend_on_the_image(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS)
    one, other = med.encode_image(images[:2]), med.encode_image(images[1:])
    assert not torch.allclose(med.match(one, ids, mask), med.match(other, ids, mask), atol=1e-3)
    assert not torch.allclose(med.decode(one, ids, mask), med.decode(other, ids, mask), atol=1e-3)
    med.embed_text(ids, mask).sum().backward()
    reached = {name for name, parameter in med.named_parameters() if parameter.grad is not None}
    assert not any("cross_attention" in name or "image" in name for name in reached)


def test_every_patch_reaches_the_match(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS[:1])
    features = med.encode_image(images[:1]).detach().requires_grad_()
    assert features.shape == (1, 1 + 4, 32)
    med.match(features, ids, mask)[0, 1].backward()
    assert features.grad is not None
    assert (features.grad.abs().sum(dim=2) > 0).all()


def test_encoder_and_decoder_share_all_but_self_attention(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS)
    features = med.encode_image(images[:2]).detach()

    def reached(output: Tensor) -> set[str]:
        med.zero_grad(set_to_none=True)
        output.square().sum().backward()
        return {name for name, parameter in med.text.named_parameters() if parameter.grad is not None}

    encoder, decoder = reached(med.match(features, ids, mask)), reached(med.decode(features, ids, mask))
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


def test_the_first_token_is_replaced_by_the_face_s_own(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    ids, mask = tokenizer(TEXTS)
    given = ids.clone()
    features = med.encode_image(images[:2])
    for face, first in ((med.match, tokenizer.encode_id), (med.decode, tokenizer.decode_id)):
        opened = torch.cat([torch.full((2, 1), first), ids[:, 1:]], dim=1)
        assert torch.equal(face(features, ids, mask), face(features, opened, mask))
    hidden = med.text(
        torch.cat([torch.full((2, 1), tokenizer.encode_id), ids[:, 1:]], dim=1), mask, "encoder", features
    )
    assert torch.allclose(med.match(features, ids, mask), med.itm_head(hidden[:, 0]))
    started = med.text(ids, mask, "encoder", features)
    assert not torch.allclose(med.match(features, ids, mask), med.itm_head(started[:, 0]), atol=1e-3)
    assert torch.equal(ids, given)


def test_embeddings_have_unit_length(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    text, image = med.embed_text(*tokenizer(TEXTS)), med.project_image(med.encode_image(images))
    assert text.shape == (2, 16)
    assert image.shape == (3, 16)
    assert torch.allclose(text.norm(dim=1), torch.ones(2))
    assert torch.allclose(image.norm(dim=1), torch.ones(3))


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
