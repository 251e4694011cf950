"""Nucleus sampling: which tokens may be sampled, against a slow and obvious one, and how often each is drawn."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from blip_core.med.decoding import GenerationConfig
from blip_core.med.generation import caption_seed, generate, row_uniforms
from blip_core.med.med import MED
from blip_core.med.sampling import HEAD, nucleus, sampled_from
from blip_core.med.tokenizer import Tokenizer

BY_SEARCH = pytest.mark.parametrize("by_search", [False, True], ids=["by sorting", "by search"])
CONFIGS = [
    GenerationConfig(p=p, temperature=temperature, top_k=top_k)
    for p in (0.01, 0.5, 0.9, 0.999, 1.0)
    for temperature in (0.3, 1.0, 2.0)
    for top_k in (0, 1, 7, 400)
]


def obvious(scores: list[float], config: GenerationConfig) -> dict[int, float]:
    """The tokens that may be sampled and their probabilities, one token after the other."""
    ordered = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if config.top_k:
        last = scores[ordered[min(config.top_k, len(ordered)) - 1]]
        ordered = [token for token in ordered if scores[token] >= last]
    chances = {token: math.exp((scores[token] - scores[ordered[0]]) / config.temperature) for token in ordered}
    total, mass, kept = math.fsum(chances.values()), 0.0, {}
    for token in ordered:
        if config.p < 1.0 and mass >= config.p * total:
            break
        kept[token] = chances[token]
        mass += chances[token]
    return {token: chance / math.fsum(kept.values()) for token, chance in kept.items() if chance > 0}


def distributions(kind: str, generator: torch.Generator) -> Tensor:
    """Scores (12, 700) of rows that are peaked, flat, full of equal scores, signed zeros, or partly forbidden."""
    spreads = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 30.0])[:, None]
    scores = spreads * torch.randn(12, 700, generator=generator)
    if kind == "bfloat16":
        return scores.bfloat16().float()
    if kind == "whole numbers":
        return scores.round()  # some of them -0.0
    if kind == "forbidden":
        return scores.masked_fill(torch.rand(12, 700, generator=generator) < 0.5, -torch.inf)
    return scores - 100.0 if kind == "negative" else scores


@BY_SEARCH
@pytest.mark.parametrize("kind", ["any", "negative", "bfloat16", "whole numbers", "forbidden"])
def test_the_set_and_its_probabilities_are_those_of_a_slow_and_obvious_implementation(
    kind: str, by_search: bool
) -> None:
    scores = distributions(kind, torch.Generator().manual_seed(3))
    sizes = set()
    for config in CONFIGS:
        weights = sampled_from(scores, config, by_search)
        for row, found in zip(scores.tolist(), weights, strict=True):
            expected = obvious(row, config)
            assert found.nonzero().flatten().tolist() == sorted(expected)
            shares = (found / found.sum()).tolist()
            assert [shares[token] for token in expected] == pytest.approx(list(expected.values()), rel=1e-9)
            sizes.add(len(expected))
    assert min(sizes) == 1
    assert max(sizes) > HEAD  # rows for which more than the head is sorted


@BY_SEARCH
def test_a_row_s_set_does_not_depend_on_the_rows_beside_it(by_search: bool) -> None:
    scores = distributions("any", torch.Generator().manual_seed(4))
    config = GenerationConfig(p=0.9)
    together = sampled_from(scores, config, by_search)
    assert (together > 0).sum(dim=-1).unique().numel() > 6
    for row, weights in zip(scores, together, strict=True):
        assert torch.equal(sampled_from(row[None], config, by_search)[0], weights)


@BY_SEARCH
@pytest.mark.parametrize(
    ("config", "allowed"),
    [
        (GenerationConfig(p=1.0), [0, 1, 2, 3, 4]),
        (GenerationConfig(p=0.75), [1, 3, 0]),
        (GenerationConfig(p=0.7, top_k=0), [1, 3]),
        (GenerationConfig(p=1.0, top_k=2), [1, 3]),
        (GenerationConfig(p=0.5, top_k=2), [1]),
        (GenerationConfig(p=0.01), [1]),
        (GenerationConfig(p=1.0, temperature=2.0), [0, 1, 2, 3, 4]),
        (GenerationConfig(p=0.8, temperature=2.0), [1, 3, 0, 4]),
    ],
    ids=["all", "p", "p to the next", "top_k", "p of what top_k leaves", "at least one", "temperature", "both"],
)
def test_tokens_are_drawn_from_the_nucleus_alone_and_as_often_as_they_should(
    config: GenerationConfig, allowed: list[int], by_search: bool
) -> None:
    probabilities = np.array([0.15, 0.4, 0.05, 0.3125, 0.0875])
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000))
    scores = torch.from_numpy(probabilities).log().float().expand(20_000, -1)
    counts = np.bincount(nucleus(scores, uniforms, config, by_search).numpy(), minlength=5)
    weights = probabilities ** (1 / config.temperature)
    expected = np.where(np.isin(np.arange(5), allowed), weights, 0)
    expected = 20_000 * expected / expected.sum()
    assert counts[expected == 0].sum() == 0
    if len(allowed) > 1:
        assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


@BY_SEARCH
def test_of_equally_probable_tokens_the_first_are_taken_and_no_more_than_needed(by_search: bool) -> None:
    scores = torch.zeros(4, 4)
    drawn = nucleus(scores, torch.tensor([0.0, 0.26, 0.51, 0.999999]), GenerationConfig(p=1.0), by_search)
    assert drawn.tolist() == [0, 1, 2, 3]
    assert nucleus(scores[:1], torch.tensor([0.9999999]), GenerationConfig(p=0.5), by_search).tolist() == [1]
    ties = torch.tensor([[0.0, 2.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    for p, kept in ((0.6, [1, 4]), (0.66, [0, 1, 4]), (0.7, [0, 1, 2, 4]), (0.95, [0, 1, 2, 3, 4, 5, 6, 7, 8])):
        assert sampled_from(ties, GenerationConfig(p=p), by_search)[0].nonzero().flatten().tolist() == kept
    tenths = sampled_from(torch.full((1, 10), -3.0), GenerationConfig(p=0.9), by_search)
    assert (tenths > 0).sum() == 9  # nine tenths are nine of ten, whatever nine times 0.1 is rounded to


@BY_SEARCH
def test_a_number_just_below_one_draws_the_last_token_that_may_be(by_search: bool) -> None:
    scores = torch.tensor([[1.0, 3.0, -50.0, 2.0, -2.0, -torch.inf]] * 2)
    uniforms = torch.tensor([math.nextafter(1.0, 0.0), 0.0], dtype=torch.float64)
    assert nucleus(scores, uniforms, GenerationConfig(p=0.95), by_search).tolist() == [3, 0]
    assert nucleus(scores, uniforms, GenerationConfig(p=1.0), by_search).tolist() == [4, 0]


def test_tokens_of_nearly_equal_probability_keep_their_places_in_the_draw() -> None:
    # in falling order these two would swap, and the number draw the other one
    one, other = torch.tensor([[1.0, 1.0 + 1e-6, 0.0]]), torch.tensor([[1.0 + 1e-6, 1.0, 0.0]])
    config = GenerationConfig(p=1.0)
    for uniform in row_uniforms(0, 200):
        assert torch.equal(nucleus(one, uniform[None], config), nucleus(other, uniform[None], config))


def test_thresholds_found_either_way_are_the_same_over_a_whole_vocabulary() -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.tensor([[0.5], [2.0], [4.0], [8.0]]) * torch.randn(4, 30_524, generator=generator)
    for config in (GenerationConfig(p=0.9), GenerationConfig(p=0.9, top_k=50), GenerationConfig(p=0.3, temperature=2)):
        for rounded in (scores, scores.bfloat16().float()):
            assert torch.equal(sampled_from(rounded, config, False), sampled_from(rounded, config, True))
    flat = replace(CONFIGS[0], p=0.999)
    assert torch.equal(sampled_from(scores, flat, False), sampled_from(scores, flat, True))


def chances_of_texts(med: MED, tokenizer: Tokenizer, image: Tensor, config: GenerationConfig) -> Counter[str]:
    """The probability of every text of two tokens at most, from the model's logits of one whole text after another."""
    keys = med.cross_keys(med.encode_image(image))

    def after(*tokens: int) -> dict[int, float]:
        logits = med.decode(keys, torch.tensor([[tokenizer.decode_id, *tokens]]), None)[0, -1]
        return obvious(logits.tolist(), config)

    chances: Counter[str] = Counter()
    for first, chance in after().items():
        if first == tokenizer.end_id:
            chances[""] += chance
            continue
        for second, then in after(first).items():
            text = [first] if second == tokenizer.end_id else [first, second]
            chances[tokenizer.decode(text)] += chance * then
    return chances


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "config",
    [GenerationConfig(p=0.9), GenerationConfig(p=0.6, temperature=1.7), GenerationConfig(p=0.95, top_k=4)],
    ids=["p", "temperature", "top_k"],
)
@torch.inference_mode()
def test_captions_of_many_images_are_as_frequent_as_the_model_says(
    med: MED, tokenizer: Tokenizer, images: Tensor, config: GenerationConfig, static: bool
) -> None:
    config = replace(config, max_length=2, min_length=0)
    seeds = [caption_seed(0, f"{number:064x}", 1) for number in range(6000)]
    keys = med.cross_keys(med.encode_image(images[:1]))
    counts = Counter(text for text, _ in generate(med, tokenizer, keys, config, seeds, static))
    chances = chances_of_texts(med, tokenizer, images[:1], config)
    assert set(counts) <= set(chances)
    often = [text for text, chance in chances.items() if chance * len(seeds) >= 10]
    assert len(often) > 5
    observed, expected = [counts[text] for text in often], [chances[text] * len(seeds) for text in often]
    rare = len(seeds) - sum(observed), len(seeds) - sum(expected)
    if rare[1] >= 10:
        observed, expected = [*observed, rare[0]], [*expected, rare[1]]
    scale = sum(observed) / sum(expected)
    assert chisquare(observed, [scale * number for number in expected]).pvalue > 1e-3
