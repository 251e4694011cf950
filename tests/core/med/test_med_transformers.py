"""Parity with transformers' BLIP: what theirs saved, ours loads, and both give the same numbers; and back again.

transformers' classes at random weights are the oracle. Their default for the epsilon of the image encoder is set to
the official code's; padded image features are left out, since their cross-attention ignores that mask.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

from blip_core.med.beam import beam_search
from blip_core.med.checkpoint import LoadedMED, load_med
from blip_core.med.convert import Kind, write_transformers
from blip_core.med.decoding import GenerationConfig
from blip_core.med.generation import CachedDecoder, greedy
from blip_core.med.lm import lm_loss
from blip_core.med.text_transformer import CrossKeys

PAD, START, END = "[PAD]", "[CLS]", "[SEP]"
CLASSES: dict[Kind, Any] = {"captioner": BlipForConditionalGeneration, "filter": BlipForImageTextRetrieval}
CPU = torch.device("cpu")


class Size(NamedTuple):
    """What their models are made of, and how many images the tests caption."""

    words: int
    text: dict[str, int]
    image: dict[str, int]
    projection: int
    images: int
    end_bias: float


TINY = Size(
    words=48,
    text={"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    image={"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    | {"image_size": 16, "patch_size": 8},
    projection=16,
    images=12,
    end_bias=0.9,
)
BASE = Size(
    words=30522,
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    image={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"image_size": 224, "patch_size": 16},
    projection=256,
    images=2,
    end_bias=3.0,
)
SIZES = {"tiny": TINY, "base-224": BASE, "base-384": BASE._replace(image=BASE.image | {"image_size": 384})}


class Twins(NamedTuple):
    """One set of weights three times: theirs, ours as read from it, and theirs as read from what ours wrote."""

    theirs: Any
    ours: LoadedMED
    again: Any
    folder: Path
    images: Tensor
    ids: Tensor
    mask: Tensor

    @property
    def both(self) -> list[Any]:
        return [self.theirs, self.again]


def their_model(kind: Kind, size: Size) -> Any:
    """A random model of theirs with opinions: logits far apart, images that matter, texts that end early."""
    special = {"bos_token_id": size.words, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {**size.text, **special, "vocab_size": size.words + 2, "label_smoothing": 0.1}
    config = BlipConfig(
        text_config=text,
        vision_config={**size.image, "layer_norm_eps": 1e-6},
        image_text_hidden_size=size.projection,
    )
    torch.manual_seed(0)
    model = CLASSES[kind](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            width = parameter.shape[-1] if parameter.dim() > 1 else 32
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * min(1.0, (32 / width) ** 0.5))
        for name, parameter in model.named_parameters():
            if "crossattention" in name and parameter.dim() > 1:
                parameter.mul_(2)
        if kind == "captioner":
            model.text_decoder.cls.predictions.bias[3] += size.end_bias
    return model


def save_theirs(model: Any, folder: Path, words: int) -> None:
    """As a folder on the hub: the model, and BERT's kind of vocabulary, which knows neither [DEC] nor [ENC]."""
    model.save_pretrained(folder)
    special = [PAD, "[UNK]", START, END, "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *(f"word{number}" for number in range(words - 5))]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 512}')


def make_twins(kind: Kind, size: Size, folder: Path) -> Twins:
    theirs = their_model(kind, size)
    save_theirs(theirs, folder / "theirs", size.words)
    ours = load_med(folder / "theirs")
    shutil.rmtree(folder / "theirs")
    write_transformers(folder / "again", ours, kind)
    again, report = CLASSES[kind].from_pretrained(folder / "again", output_loading_info=True)
    assert not any(report.values()), report  # no missing, unexpected or misshapen key
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    side = size.image["image_size"]
    images = torch.randn(2, 3, side, side)
    ids = torch.tensor([[2, 10, 11, 12, 13, 3], [2, 20, 21, 3, 0, 0]])
    return Twins(theirs, ours, again.eval(), folder / "again", images, ids, ids != 0)


@pytest.fixture(scope="module", params=SIZES)
def captioners(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    folder = tmp_path_factory.mktemp("captioner")
    yield make_twins("captioner", SIZES[request.param], folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=SIZES)
def filters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    folder = tmp_path_factory.mktemp("filter")
    yield make_twins("filter", SIZES[request.param], folder)
    shutil.rmtree(folder)


def grounded(twins: Twins, images: Tensor) -> CrossKeys:
    return twins.ours.med.cross_keys(twins.ours.med.encode_image(images))


def opened(ids: Tensor, token: int) -> Tensor:
    return torch.cat([torch.full((len(ids), 1), token), ids[:, 1:]], dim=1)


@torch.inference_mode()
def test_caption_logits_loss_and_image_features_agree(captioners: Twins) -> None:
    ids, mask, med = captioners.ids, captioners.mask, captioners.ours.med
    dec = opened(ids, captioners.ours.tokenizer.decode_id)
    labels = dec.masked_fill(~mask, -100)
    features = med.encode_image(captioners.images)
    logits = med.decode(med.cross_keys(features), ids, mask)
    assert logits[mask].std() > 0.5
    for model in captioners.both:
        theirs = model(pixel_values=captioners.images, input_ids=dec, attention_mask=mask.long(), labels=labels)
        assert torch.allclose(features, theirs.last_hidden_state, atol=1e-4)
        assert torch.allclose(logits[mask], theirs.logits[mask], atol=1e-4)
        assert lm_loss(logits, ids, mask).item() == pytest.approx(theirs.loss.item(), abs=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@torch.inference_mode()
def test_captions_agree_token_for_token(captioners: Twins, beams: int, request: pytest.FixtureRequest) -> None:
    size = SIZES[request.node.callspec.params["captioners"]]
    side = size.image["image_size"]
    images = torch.randn(size.images, 3, side, side, generator=torch.Generator().manual_seed(7))
    config = GenerationConfig(beams=beams, max_length=8, min_length=2)
    decode = greedy if beams == 1 else beam_search
    dec = captioners.ours.tokenizer.decode_id
    decoder = CachedDecoder(captioners.ours.med, grounded(captioners, images))
    ours = [caption.tokens for caption in decode(decoder, [dec], size.images, 3, config, CPU)]
    assert len({len(text) for text in ours}) > 1
    # their lengths count [DEC]
    theirs = captioners.again.generate(images, num_beams=beams, do_sample=False, min_length=3, max_length=9).tolist()
    assert ours == [text[1 : text.index(3)] if 3 in text else text[1:] for text in theirs]


@torch.inference_mode()
def test_itm_logits_agree_with_cls_and_with_enc(filters: Twins) -> None:
    ids, mask, med = filters.ids, filters.mask, filters.ours.med
    image = grounded(filters, filters.images)
    enc, cls = med.match(image, ids, mask), med.match(image, ids, mask, open_with_enc=False)
    assert (enc - cls).abs().max() > 1e-2
    for model in filters.both:
        theirs = model(opened(ids, filters.ours.tokenizer.encode_id), filters.images, attention_mask=mask.long())
        assert torch.allclose(enc, theirs.itm_score, atol=1e-4)
    theirs = filters.theirs(ids, filters.images, attention_mask=mask.long())
    assert torch.allclose(cls, theirs.itm_score, atol=1e-4)


@torch.inference_mode()
def test_itc_features_agree(filters: Twins) -> None:
    ids, mask, med = filters.ids, filters.mask, filters.ours.med
    image = med.project_image(med.encode_image(filters.images))
    text = med.embed_text(ids, mask)
    for model in filters.both:
        theirs = model(ids, filters.images, attention_mask=mask.long(), use_itm_head=False)
        assert torch.allclose(text, F.normalize(model.text_proj(theirs.question_embeds[:, 0]), dim=1), atol=1e-4)
        assert torch.allclose(image @ text.T, theirs.itm_score, atol=1e-4)
