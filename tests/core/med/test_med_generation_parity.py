"""Decoding against transformers' generate, over one and the same model: penalty, prompt, lengths and limits."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blip_core.med.beam import beam_search
from blip_core.med.decoding import Caption, GenerationConfig
from blip_core.med.generation import greedy
from blip_core.med.next_token import restrict
from blip_core.med.sampling import sampled_from

VOCABULARY, END, DECODE = 40, 3, 38
ROWS = 24
CPU = torch.device("cpu")
PROMPTS = [[DECODE], [DECODE, 11, 7, 12]]


class TheirDecoder:
    """Their text decoder, which reads the whole text again at every step."""

    def __init__(self, model: BlipForConditionalGeneration, images: Tensor) -> None:
        self.model = model
        self.image = model.vision_model(images).last_hidden_state
        self.history = torch.empty(len(images), 0, dtype=torch.long)

    def step(self, tokens: Tensor) -> Tensor:
        self.history = torch.cat([self.history, tokens], dim=1)
        return self.model.text_decoder(self.history, encoder_hidden_states=self.image).logits[:, -1]

    def select(self, rows: Tensor) -> None:
        self.image, self.history = self.image[rows], self.history[rows]


def their_model(seed: int, towards_end: float) -> BlipForConditionalGeneration:
    """A small random one. `towards_end` is added to [SEP]'s logit, so that some texts end and others are cut."""
    torch.manual_seed(seed)
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": DECODE}
    text |= {"sep_token_id": END, "eos_token_id": END}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 8}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.text_decoder.cls.predictions.bias[END] += towards_end
    return model


def their_captions(
    model: BlipForConditionalGeneration, images: Tensor, prompt: list[int], config: GenerationConfig, beams: int
) -> list[list[int]]:
    """What their generate writes after the prompt, without [SEP] and padding. Its lengths count [DEC]."""
    texts = model.generate(
        images,
        input_ids=torch.LongTensor([[*prompt, END]] * len(images)),  # they take the last one away
        do_sample=False,
        num_beams=beams,
        min_length=config.min_length + 1,
        max_length=config.max_length + 1,
        repetition_penalty=config.repetition_penalty,
    )
    written = [row[len(prompt) :] for row in texts.tolist()]
    return [row[: row.index(END)] if END in row else row for row in written]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["no prompt", "prompt"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("penalty", [1.0, 1.1, 2.0])
@torch.inference_mode()
def test_captions_are_theirs_token_for_token(prompt: list[int], beams: int, penalty: float) -> None:
    config = GenerationConfig(beams=beams, max_length=12, min_length=5, repetition_penalty=penalty)
    decode = greedy if beams == 1 else beam_search
    images = torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    lengths, penalised = set(), 0
    for seed, towards_end in ((0, 0.5), (1, 1.5), (2, 3.0)):
        model = their_model(seed, towards_end)
        ours = decode(TheirDecoder(model, images), prompt, ROWS, END, config, CPU)
        assert [caption.tokens for caption in ours] == their_captions(model, images, prompt, config, beams)
        lengths |= {len(caption.tokens) for caption in ours}
        plain = decode(TheirDecoder(model, images), prompt, ROWS, END, replace(config, repetition_penalty=1.0), CPU)
        penalised += [caption.tokens for caption in ours] != [caption.tokens for caption in plain]
    assert lengths >= {5 + 1 - len(prompt), 12 + 1 - len(prompt)}  # the shortest and the longest that may be
    assert (penalised > 0) == (penalty != 1.0)


@pytest.mark.parametrize("beams", [1, 3])
@torch.inference_mode()
def test_the_recorded_log_probability_is_the_models_own_under_a_penalty(beams: int) -> None:
    config = GenerationConfig(beams=beams, max_length=9, min_length=5, repetition_penalty=1.5)
    decode = greedy if beams == 1 else beam_search
    images = torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    model, prompt = their_model(1, 1.5), PROMPTS[1]
    captions = decode(TheirDecoder(model, images), prompt, ROWS, END, config, CPU)
    assert len({len(caption.tokens) for caption in captions}) > 1
    for image, caption in zip(images, captions, strict=True):
        assert caption.logprob == pytest.approx(own_logprob(model, image, prompt, caption, config.max_length), rel=1e-4)


def own_logprob(
    model: BlipForConditionalGeneration, image: Tensor, prompt: list[int], caption: Caption, max_length: int
) -> float:
    tokens = [*prompt, *caption.tokens]
    tokens += [END] * (len(tokens) - 1 < max_length)
    seen = model.vision_model(image[None]).last_hidden_state
    predicted = model.text_decoder(torch.tensor([tokens]), encoder_hidden_states=seen).logits[0].log_softmax(dim=-1)
    places = range(len(prompt), len(tokens))
    return sum(predicted[place - 1, tokens[place]].item() for place in places) / len(places)


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(top_k=50, p=0.9),
        GenerationConfig(top_k=50, p=0.9, repetition_penalty=1.1, min_length=5),
        GenerationConfig(top_k=50, p=0.9, temperature=0.7),
        GenerationConfig(top_k=3, p=0.99),
        GenerationConfig(top_k=0, p=0.5),
        GenerationConfig(top_k=1000, p=1.0, temperature=1.5),
    ],
    ids=["official", "official with penalty", "temperature", "few", "p alone", "all"],
)
@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("by_search", [False, True], ids=["by sorting", "by search"])
def test_tokens_are_sampled_from_the_set_and_with_the_probabilities_of_their_warpers(
    config: GenerationConfig, spread: float, by_search: bool
) -> None:
    generator = torch.Generator().manual_seed(int(10 * spread))
    logits = spread * torch.randn(50, 1000, generator=generator)
    history = torch.randint(1000, (50, 4), generator=generator)
    theirs = their_warpers(config)(cast(torch.LongTensor, history), logits).softmax(dim=-1)
    ours = sampled_from(restrict(logits, history, 3, END, config), config, by_search)
    assert torch.equal(ours > 0, theirs > 0)
    assert torch.allclose(ours / ours.sum(dim=-1, keepdim=True), theirs.double(), atol=1e-6)


def their_warpers(config: GenerationConfig) -> LogitsProcessorList:
    """In the order in which their generate puts them."""
    warpers = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    warpers.append(MinLengthLogitsProcessor(config.min_length + 1, END))
    warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.p < 1.0:
        warpers.append(TopPLogitsWarper(config.p))
    return warpers


@pytest.mark.parametrize("by_search", [False, True], ids=["by sorting", "by search"])
def test_tokens_as_probable_as_the_last_of_top_k_may_be_sampled_too(by_search: bool) -> None:
    logits = torch.tensor([[2.0, 1.0, 3.0, 1.0, 0.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    weights = sampled_from(logits, GenerationConfig(top_k=3, p=1.0), by_search)
    kept = [row.nonzero().flatten().tolist() for row in weights]
    assert kept == [[0, 1, 2, 3, 5], [0, 1, 2]]
    theirs = TopKLogitsWarper(3)(torch.zeros(2, 1, dtype=torch.long), logits).isfinite()
    assert [row.nonzero().flatten().tolist() for row in theirs] == kept
