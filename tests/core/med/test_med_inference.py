"""A MED that is only used: in each precision it computes what the trained one does, as exactly as it can."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_core.errors import ConfigError
from blip_core.med.inference import PIXELS_AT_ONCE, Int8Linear, OneDNNLinear, Precision, encode_images, prepare
from blip_core.med.med import MED
from blip_core.med.tokenizer import Tokenizer

TEXTS = ["a red circle", "two green rings under a yellow star"]


def prepared(med: MED, precision: Precision) -> MED:
    used = copy.deepcopy(med)
    prepare(used, precision)
    return used


@torch.inference_mode()
def answers(med: MED, images: Tensor, tokenizer: Tokenizer) -> Tensor:
    """What all faces say of two pairs."""
    ids, mask = tokenizer(TEXTS)
    features = encode_images(med, images[:2])
    image = med.cross_keys(features)
    logits = med.decode(image, ids, mask)[mask].log_softmax(dim=1)
    cosines = med.project_image(features) @ med.embed_text(ids, mask).T
    return torch.cat([part.float().flatten() for part in (med.match(image, ids, mask), cosines, logits)])


def test_float32_computes_as_in_training(med: MED, images: Tensor, tokenizer: Tokenizer) -> None:
    used = prepared(med, "fp32")
    assert all(type(module) is OneDNNLinear for module in used.modules() if isinstance(module, nn.Linear))
    assert torch.allclose(answers(used, images, tokenizer), answers(med, images, tokenizer), atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_lower_precision_stays_close(precision: Precision, med: MED, images: Tensor, tokenizer: Tokenizer) -> None:
    exact, rough = answers(med, images, tokenizer), answers(prepared(med, precision), images, tokenizer)
    assert not exact.equal(rough)
    assert F.cosine_similarity(exact, rough, dim=0) > 0.999


def test_int8_is_for_what_concerns_images_alone(med: MED) -> None:
    names = {name for name, module in prepared(med, "int8").named_modules() if isinstance(module, Int8Linear)}
    in_encoder = {name for name, module in med.named_modules() if "vit" in name and isinstance(module, nn.Linear)}
    keys = {f"text.layers.{layer}.cross_attention.{part}" for layer in range(2) for part in ("key", "value")}
    assert names == in_encoder | keys


def test_an_int8_layer_multiplies_whole_numbers_and_scales_them_back() -> None:
    torch.manual_seed(0)
    linear, input = nn.Linear(48, 24), 3 * torch.randn(5, 7, 48)
    weight, rows = linear.weight.detach().numpy(), input.numpy().reshape(35, 48)
    weight_scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    row_scale = np.abs(rows).max(axis=1, keepdims=True) / 127
    products = np.rint(rows / row_scale).astype(np.int64) @ np.rint(weight / weight_scale).astype(np.int64).T
    expected = products * row_scale * weight_scale.T + linear.bias.detach().numpy()
    found = Int8Linear(linear)(input)
    assert found.shape == (5, 7, 24)
    assert np.allclose(found.numpy().reshape(35, 24), expected, atol=1e-4)
    assert (found - linear(input)).norm() < 0.02 * linear(input).norm()


def test_what_int8_gives_for_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    layer, rows = Int8Linear(nn.Linear(32, 16)), torch.randn(9, 32) * torch.logspace(-3, 3, 9)[:, None]
    assert layer(rows).equal(torch.cat([layer(row[None]) for row in rows]))


def test_a_row_of_zeros_gives_the_bias() -> None:
    linear = nn.Linear(8, 4)
    assert Int8Linear(linear)(torch.zeros(2, 8)).equal(linear.bias.detach().expand(2, 4))


def test_int8_elsewhere_than_on_a_cpu_is_refused(med: MED) -> None:
    with pytest.raises(ConfigError, match="int8: is for CPUs, and the model is on meta"):
        prepare(med.to("meta"), "int8")


def test_images_are_encoded_in_parts_as_all_at_once(med: MED) -> None:
    torch.manual_seed(0)
    images = torch.randn(2 * PIXELS_AT_ONCE // 16**2 + 3, 3, 16, 16)
    parts: list[int] = []
    hook = med.image_encoder.register_forward_hook(lambda module, given, out: parts.append(len(given[0])))
    with torch.inference_mode():
        features = encode_images(med, images)
        hook.remove()
        assert torch.allclose(features, med.encode_image(images), atol=1e-5)
    assert parts == [PIXELS_AT_ONCE // 16**2] * 2 + [3]


@torch.inference_mode()
def test_one_image_serves_all_of_its_texts_at_once(med: MED, images: Tensor, tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer([*TEXTS, "a blue square", *TEXTS, "a star"])
    image = med.cross_keys(med.encode_image(images[:2]))
    each = image.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    assert torch.allclose(med.match(image, ids, mask), med.match(each, ids, mask), atol=1e-5)
    features = med.encode_image(images[:2])
    shown = torch.tensor([[True, True, False, True, False], [True, False, True, True, True]])
    masked = med.cross_keys(features, shown)
    each = masked.select(torch.tensor([0, 0, 0, 1, 1, 1]))
    assert torch.allclose(med.match(masked, ids, mask), med.match(each, ids, mask), atol=1e-5)


@torch.inference_mode()
def test_the_first_token_alone_is_that_of_the_whole_text(med: MED, images: Tensor, tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(TEXTS)
    image = med.cross_keys(med.encode_image(images[:2]))
    for seen in (None, image):
        alone, whole = (med.text(ids, mask, "encoder", seen, first=first) for first in (True, False))
        assert alone.shape == (2, 1, 32)
        assert torch.allclose(alone, whole[:, :1], atol=1e-6)
