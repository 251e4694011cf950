"""The momentum encoders follow, and the queue is a ring."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.med.architecture import Architecture
from blip_core.med.med import MED
from blip_core.med.momentum import NO_IMAGE, EmbeddingQueue, MomentumEncoders
from blip_core.med.tokenizer import Tokenizer


def test_the_momentum_encoders_start_as_the_model(
    med: MED, architecture: Architecture, tokenizer: Tokenizer, images: Tensor
) -> None:
    ids, mask = tokenizer(["a red circle", "a star", "two rings"])
    image, text = MomentumEncoders(med, architecture).eval()(images, ids, mask)
    assert torch.allclose(image, med.project_image(med.encode_image(images)), atol=1e-6)
    assert torch.allclose(text, med.embed_text(ids, mask), atol=1e-6)


def test_each_step_moves_a_share_of_the_way(med: MED, architecture: Architecture) -> None:
    slow = MomentumEncoders(med, architecture)
    with torch.no_grad():
        slow.text_projection.bias.fill_(2.0)
        med.text_projection.bias.fill_(4.0)
    slow.follow(med, momentum=0.75)
    assert slow.text_projection.bias.tolist() == [2.5] * 16
    slow.follow(med, momentum=0.75)
    assert slow.text_projection.bias.tolist() == [2.875] * 16
    assert med.text_projection.bias.tolist() == [4.0] * 16


def test_they_have_no_cross_attention_no_decoder_and_no_gradient(med: MED, architecture: Architecture) -> None:
    slow = MomentumEncoders(med, architecture)
    names = dict(slow.named_parameters())
    assert not [name for name in names if "cross_attention" in name or "decoder" in name or "head" in name]
    assert not any(parameter.requires_grad for parameter in names.values())
    assert {"image_encoder.vit.cls_token", "text.layers.1.self_attention.encoder.query.weight"} <= names.keys()
    own = {parameter.data_ptr() for parameter in names.values()}
    assert not own & {parameter.data_ptr() for parameter in med.parameters()}


@pytest.mark.parametrize("batches", [[3, 3, 3, 3], [7, 1, 5], [2, 9, 4], [7, 7], [20, 3]])
def test_the_queue_is_a_ring_for_any_batch_size(batches: list[int]) -> None:
    torch.manual_seed(0)
    queue = EmbeddingQueue(7, 4)
    ring = [(image, text, NO_IMAGE) for image, text in zip(queue.images.tolist(), queue.texts.tolist(), strict=True)]
    oldest, number = 0, 0
    for size in batches:
        images, texts = torch.randn(size, 4), torch.randn(size, 4)
        ids = torch.arange(number, number + size)
        number += size
        queue.push(images, texts, ids)
        entries = list(zip(images.tolist(), texts.tolist(), ids.tolist(), strict=True))
        for entry in entries[-7:]:
            ring[oldest] = entry
            oldest = (oldest + 1) % 7
        assert queue.images.tolist() == [image for image, _, _ in ring]
        assert queue.texts.tolist() == [text for _, text, _ in ring]
        assert queue.image_ids.tolist() == [image_id for _, _, image_id in ring]
        assert queue.pointer.item() == oldest


def test_the_queue_starts_with_directions_that_are_no_image_s() -> None:
    queue = EmbeddingQueue(50, 8)
    assert queue.image_ids.tolist() == [-1] * 50
    assert torch.allclose(F.normalize(queue.images), queue.images)
    assert len(set(map(tuple, queue.texts.tolist()))) == 50
