"""Decoding in fixed shapes writes what decoding otherwise writes, in one graph, for one batch after another."""

import copy
import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blip_core.med import static_decoder as static
from blip_core.med.decoding import Caption, GenerationConfig
from blip_core.med.generation import CachedDecoder, generate, greedy, prompt_tokens, row_uniforms, sample
from blip_core.med.med import MED
from blip_core.med.static_decoder import Plan, StaticDecoder, static_decoder
from blip_core.med.text_transformer import CrossKeys
from blip_core.med.tokenizer import Tokenizer

CPU = torch.device("cpu")
CONFIG = GenerationConfig(p=0.95, max_length=10, min_length=0)
SEEDS = range(100, 106)


@pytest.fixture
def image(med: MED, images: Tensor) -> CrossKeys:
    with torch.no_grad():
        return med.cross_keys(med.encode_image(images))


@pytest.fixture
def ending(med: MED, tokenizer: Tokenizer) -> MED:
    """A MED of which most captions end before they must, each elsewhere."""
    with torch.no_grad():
        med.text.head_bias[tokenizer.end_id] += 3.0
    return med


def uniforms(seeds: range, config: GenerationConfig) -> Tensor:
    return torch.stack([row_uniforms(seed, config.max_length) for seed in seeds])


def expected(med: MED, tokenizer: Tokenizer, image: CrossKeys, config: GenerationConfig, seeds: range) -> list[Caption]:
    """By the decoder whose rows leave when they are finished."""
    rows = image.select(torch.arange(len(image)).repeat_interleave(len(seeds) // len(image)))
    prompt, decoder = prompt_tokens(tokenizer, config.prompt), CachedDecoder(med, rows)
    if config.method == "greedy":
        return greedy(decoder, prompt, len(seeds), tokenizer.end_id, config, CPU)
    return sample(decoder, prompt, uniforms(seeds, config), tokenizer.end_id, config)


def plan_of(tokenizer: Tokenizer, config: GenerationConfig) -> Plan:
    return Plan(tuple(prompt_tokens(tokenizer, config.prompt)), tokenizer.end_id, tokenizer.pad_id, config)


def decoded(
    decoder: StaticDecoder, med: MED, image: CrossKeys, config: GenerationConfig, seeds: range
) -> list[Caption]:
    return decoder.decode(med, image, None if config.method == "greedy" else uniforms(seeds, config))


def assert_same(found: list[Caption], wanted: list[Caption]) -> None:
    assert [caption.tokens for caption in found] == [caption.tokens for caption in wanted]
    assert [caption.logprob for caption in found] == pytest.approx([caption.logprob for caption in wanted], rel=1e-4)


@pytest.mark.parametrize("method", ["nucleus", "greedy"])
@pytest.mark.parametrize("prompt", ["", "a red"])
@pytest.mark.parametrize(
    "limits", [{}, {"repetition_penalty": 2.0}, {"min_length": 6}, {"top_k": 5, "temperature": 2.0}]
)
@torch.inference_mode()
def test_captions_are_those_of_the_decoder_whose_rows_leave(
    ending: MED, tokenizer: Tokenizer, image: CrossKeys, method: str, prompt: str, limits: dict[str, float]
) -> None:
    config = replace(CONFIG, method=method, prompt=prompt, **limits)
    decoder = StaticDecoder(ending, image, 20, plan_of(tokenizer, config))
    lengths = set()
    for begin in (0, 1000, 2000):  # the same decoder for every batch
        seeds = range(begin, begin + 60)
        found = decoded(decoder, ending, image, config, seeds)
        assert_same(found, expected(ending, tokenizer, image, config, seeds))
        lengths |= {len(caption.tokens) for caption in found}
    if method == "nucleus":
        assert len(lengths) > 3
        assert max(lengths) > min(lengths) >= config.min_length - len(prompt.split())


@pytest.mark.parametrize("max_length", [1, 2, 3, 5])
@torch.inference_mode()
def test_a_prompt_may_take_up_every_place(ending: MED, tokenizer: Tokenizer, image: CrossKeys, max_length: int) -> None:
    config = replace(CONFIG, prompt="a red", max_length=max_length)
    assert plan_of(tokenizer, config).given >= 2
    decoder = StaticDecoder(ending, image, 2, plan_of(tokenizer, config))
    found = decoded(decoder, ending, image, config, SEEDS)
    assert_same(found, expected(ending, tokenizer, image, config, SEEDS))


@torch.inference_mode()
def test_a_smaller_batch_runs_in_the_places_of_a_larger_one(
    ending: MED, tokenizer: Tokenizer, image: CrossKeys
) -> None:
    plan = plan_of(tokenizer, CONFIG)
    decoder = static_decoder(ending, image, 2, plan)
    decoded(decoder, ending, image, CONFIG, SEEDS)
    for images in ([2], [1, 0]):
        few = image.select(torch.tensor(images))
        assert static_decoder(ending, few, 2, plan) is decoder
        seeds = range(7, 7 + 2 * len(images))
        assert_same(decoded(decoder, ending, few, CONFIG, seeds), expected(ending, tokenizer, few, CONFIG, seeds))


@torch.inference_mode()
def test_padded_image_features_are_not_looked_at(med: MED, tokenizer: Tokenizer, images: Tensor) -> None:
    features = med.encode_image(images)
    mask = torch.arange(features.shape[1]).expand(3, -1) < torch.tensor([[2], [3], [5]])
    image, other = med.cross_keys(features, mask), med.cross_keys(features.flip(0), mask.flip(0))
    decoder = StaticDecoder(med, image, 2, plan_of(tokenizer, CONFIG))
    for shown in (image, other):
        assert_same(decoded(decoder, med, shown, CONFIG, SEEDS), expected(med, tokenizer, shown, CONFIG, SEEDS))


@torch.inference_mode()
def test_one_decoder_is_kept_for_a_model_while_it_fits(med: MED, tokenizer: Tokenizer, image: CrossKeys) -> None:
    plan = plan_of(tokenizer, CONFIG)
    kept = static_decoder(med, image, 2, plan)
    addresses = [keys.data_ptr() for layer in (*kept.state.image.layers, *kept.state.text) for keys in layer]
    generate(med, tokenizer, image, CONFIG, SEEDS, static=True)
    assert static_decoder(med, image, 2, plan) is kept
    assert addresses == [keys.data_ptr() for layer in (*kept.state.image.layers, *kept.state.text) for keys in layer]
    masked = CrossKeys(image.layers, torch.ones(3, image.layers[0][0].shape[2], dtype=torch.bool))
    larger = image.select(torch.tensor([0, 1, 2, 0]))
    others = [(image, 3, plan), (image, 2, plan_of(tokenizer, replace(CONFIG, p=0.5))), (masked, 2, plan)]
    for arguments in [*others, (larger, 2, plan)]:
        assert static_decoder(med, *arguments) is not kept
        kept = static_decoder(med, *arguments)


@torch.inference_mode()
def test_a_decoder_goes_with_its_model(med: MED, tokenizer: Tokenizer, image: CrossKeys) -> None:
    passing = copy.deepcopy(med)
    generate(passing, tokenizer, image, CONFIG, SEEDS, static=True)
    decoder = weakref.ref(static_decoder(passing, image, 2, plan_of(tokenizer, CONFIG)))
    assert decoder() is not None
    del passing
    gc.collect()
    assert decoder() is None


@pytest.mark.parametrize("method", ["nucleus", "greedy", "beam"])
def test_generate_writes_the_same_captions_either_way(
    ending: MED, tokenizer: Tokenizer, image: CrossKeys, method: str
) -> None:
    config = replace(CONFIG, method=method, prompt="a red", repetition_penalty=1.5)
    seeds = range(18)
    one, other = (generate(ending, tokenizer, image, config, seeds, static=static) for static in (True, False))
    assert [text for text, _ in one] == [text for text, _ in other]
    assert [logprob for _, logprob in one] == pytest.approx([logprob for _, logprob in other], rel=1e-4)
    each = image.select(torch.arange(3).repeat_interleave(6))
    assert [text for text, _ in generate(ending, tokenizer, each, config, seeds)] == [text for text, _ in other]


@pytest.mark.parametrize("layers_compiled", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.inference_mode()
def test_a_step_is_one_graph_whatever_it_does(
    ending: MED, tokenizer: Tokenizer, image: CrossKeys, backend: str, layers_compiled: bool
) -> None:
    torch.compiler.reset()
    if layers_compiled:
        ending.compile_layers()
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(static.step, backend=counted, fullgraph=True, dynamic=False)
    limits = {"prompt": "a red", "repetition_penalty": 1.5, "min_length": 4}
    nucleus, most_probable = replace(CONFIG, top_k=20, **limits), replace(CONFIG, method="greedy", **limits)
    for number, config in enumerate((CONFIG, nucleus, most_probable), start=1):
        plan = plan_of(tokenizer, config)
        state = static._empty_state(image, 2, plan)
        state.uniforms[:, plan.given :] = uniforms(SEEDS, config)[:, : config.max_length - plan.given]
        for _ in range(config.max_length):
            compiled(ending, state, plan)
        assert len(graphs) == number
        found = [text[1 + plan.given :] for text in state.tokens.tolist()]
        wanted = expected(ending, tokenizer, image, config, SEEDS)
        for text, caption in zip(found, wanted, strict=True):
            assert text[: len(caption.tokens)] == caption.tokens
            rest = [tokenizer.end_id, *itertools.repeat(tokenizer.pad_id, len(text))]
            assert text[len(caption.tokens) :] == rest[: len(text) - len(caption.tokens)]
