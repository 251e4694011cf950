"""Decoding: with and without cache, in any batch, within its limits, and against exhaustive search."""

import hashlib
import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blip_core.med.beam import beam_search
from blip_core.med.decoding import Caption, GenerationConfig
from blip_core.med.generation import (
    CachedDecoder,
    caption_seed,
    generate,
    greedy,
    prompt_tokens,
    row_uniforms,
    sample,
)
from blip_core.med.med import MED
from blip_core.med.next_token import restrict
from blip_core.med.text_transformer import CrossKeys
from blip_core.med.tokenizer import Tokenizer

CPU = torch.device("cpu")
END = 0


class UncachedDecoder:
    """The same model, which reads the whole text again at every step."""

    def __init__(self, med: MED, image: CrossKeys) -> None:
        self.med = med
        self.image = image
        self.history = torch.empty(len(image), 0, dtype=torch.long)

    def step(self, tokens: Tensor) -> Tensor:
        self.history = torch.cat([self.history, tokens], dim=1)
        return self.med.decode(self.image, self.history, None)[:, -1]

    def select(self, rows: Tensor) -> None:
        self.image, self.history = self.image.select(rows), self.history[rows]


class ToyDecoder:
    """Next-token probabilities looked up by the text so far, prompt left out; one table a row."""

    def __init__(self, tables: list[dict[tuple[int, ...], list[float]]]) -> None:
        self.rows: list[tuple[dict[tuple[int, ...], list[float]], list[int]]] = [(table, []) for table in tables]

    def step(self, tokens: Tensor) -> Tensor:
        self.rows = [(table, [*text, *new]) for (table, text), new in zip(self.rows, tokens.tolist(), strict=True)]
        # a row may stay for a while after its end; what is said of it then must not matter
        after = [table[()][::-1] if END in text[1:] else table[tuple(text[1:])] for table, text in self.rows]
        return torch.tensor(after).log()

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]


def _random_table(seed: int, vocabulary: int, length: int) -> dict[tuple[int, ...], list[float]]:
    rng = np.random.default_rng(seed)
    texts = (text for n in range(length) for text in itertools.product(range(1, vocabulary), repeat=n))
    return {text: rng.dirichlet(np.ones(vocabulary)).tolist() for text in texts}


def _exhaustive(table: dict[tuple[int, ...], list[float]], vocabulary: int, length: int) -> Caption:
    """The best mean log-probability among all texts that end within `length` tokens or are cut there."""
    found = []
    for n in range(length + 1):
        for text in itertools.product(range(1, vocabulary), repeat=n):
            tokens = [*text, END] if n < length else list(text)
            total = sum(math.log(table[tuple(tokens[:place])][token]) for place, token in enumerate(tokens))
            found.append(Caption(list(text), total / len(tokens)))
    return max(found, key=lambda caption: caption.logprob)


@pytest.fixture
def image(med: MED, images: Tensor) -> CrossKeys:
    with torch.no_grad():
        return med.cross_keys(med.encode_image(images))


CONFIG = GenerationConfig(p=0.95, max_length=8, min_length=0)


@pytest.mark.parametrize("prompt", ["", "a red"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
@torch.inference_mode()
def test_cached_and_uncached_decoding_agree(
    med: MED, tokenizer: Tokenizer, image: CrossKeys, prompt: str, penalty: float
) -> None:
    config = replace(CONFIG, repetition_penalty=penalty, min_length=3)
    given = prompt_tokens(tokenizer, prompt)
    uniforms = torch.stack([row_uniforms(seed, 8) for seed in range(3)])
    for decode in (
        lambda decoder: greedy(decoder, given, 3, tokenizer.end_id, config, CPU),
        lambda decoder: sample(decoder, given, uniforms, tokenizer.end_id, config),
        lambda decoder: beam_search(decoder, given, 3, tokenizer.end_id, config, CPU),
    ):
        cached, uncached = decode(CachedDecoder(med, image)), decode(UncachedDecoder(med, image))
        assert [caption.tokens for caption in cached] == [caption.tokens for caption in uncached]
        assert [caption.logprob for caption in cached] == pytest.approx([caption.logprob for caption in uncached], 1e-4)


@pytest.mark.parametrize("method", ["nucleus", "beam", "greedy"])
def test_an_image_has_the_same_captions_in_any_batch(
    med: MED, tokenizer: Tokenizer, image: CrossKeys, method: str
) -> None:
    config = replace(CONFIG, method=method, p=1.0)
    rows = [0, 1, 2, 1, 0, 2]
    seeds = [10, 11, 12, 13, 14, 15]
    together = generate(med, tokenizer, image.select(torch.tensor(rows)), config, seeds)
    for row, seed, (text, logprob) in zip(rows, seeds, together, strict=True):
        [(alone, alone_logprob)] = generate(med, tokenizer, image.select(slice(row, row + 1)), config, [seed])
        assert alone == text
        assert alone_logprob == pytest.approx(logprob, rel=1e-4)
    if method == "nucleus":
        assert len({text for text, _ in together}) > 3


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("settings", [{}, {"prompt": "a red", "repetition_penalty": 1.5, "min_length": 5, "top_k": 20}])
def test_a_caption_follows_from_run_seed_image_and_candidate_in_whatever_batch_they_come(
    med: MED, tokenizer: Tokenizer, image: CrossKeys, settings: dict[str, Any], static: bool
) -> None:
    config = replace(CONFIG, p=1.0, **settings)
    wanted = [(row, number) for number in (1, 2, 3, 4, 5) for row in (0, 1, 2)]

    def captions(order: list[tuple[int, int]], size: int) -> dict[tuple[int, int], tuple[str, float]]:
        found: dict[tuple[int, int], tuple[str, float]] = {}
        for begin in range(0, len(order), size):
            batch = order[begin : begin + size]
            rows = image.select(torch.tensor([row for row, _ in batch]))
            seeds = [caption_seed(7, f"sha256 of {row}", number) for row, number in batch]
            found |= dict(zip(batch, generate(med, tokenizer, rows, config, seeds, static), strict=True))
        return found

    together = captions(wanted, len(wanted))
    assert len({text for text, _ in together.values()}) > 8
    for order in (wanted, wanted[::-1], sorted(wanted)):
        for size in (1, 4, 7):
            again = captions(order, size)
            assert {key: text for key, (text, _) in again.items()} == {key: text for key, (text, _) in together.items()}
            assert all(again[key][1] == pytest.approx(together[key][1], rel=1e-4) for key in wanted)


@pytest.mark.parametrize("method", ["nucleus", "beam", "greedy"])
def test_captions_of_one_encoding_are_those_of_an_encoding_for_each(
    med: MED, tokenizer: Tokenizer, image: CrossKeys, method: str
) -> None:
    config, seeds = replace(CONFIG, method=method), range(12)
    shared = generate(med, tokenizer, image, config, seeds)
    each = [image.select(slice(row, row + 1)) for row in range(3) for _ in range(4)]
    alone = [generate(med, tokenizer, own, config, [seed])[0] for own, seed in zip(each, seeds, strict=True)]
    assert [text for text, _ in shared] == [text for text, _ in alone]
    assert [logprob for _, logprob in shared] == pytest.approx([logprob for _, logprob in alone], rel=1e-4)


def test_seeds_that_cannot_be_shared_out_are_named(med: MED, tokenizer: Tokenizer, image: CrossKeys) -> None:
    for seeds in (range(4), range(2)):
        with pytest.raises(ValueError, match=f"{len(seeds)} seeds for 3 images"):
            generate(med, tokenizer, image, CONFIG, seeds)


def test_rows_that_end_leave_the_others_undisturbed() -> None:
    tables = [_random_table(seed, 4, 6) for seed in range(12)]
    config = GenerationConfig(p=1.0, min_length=0, max_length=6)
    uniforms = torch.stack([row_uniforms(seed, 6) for seed in range(12)])
    together = sample(ToyDecoder(tables), [9], uniforms, END, config)
    assert len({len(caption.tokens) for caption in together}) > 3
    for table, row, caption in zip(tables, uniforms, together, strict=True):
        [alone] = sample(ToyDecoder([table]), [9], row[None], END, config)
        assert alone.tokens == caption.tokens
        text: list[int] = []
        for uniform in row.tolist():
            places = np.cumsum(table[tuple(text)])
            token = int(np.searchsorted(places, uniform * places[-1], side="right"))
            if token == END:
                break
            text.append(token)
        assert caption.tokens == text


def test_beams_that_are_done_do_not_wait_for_the_other_rows() -> None:
    # done at once when alone: no text of one token beats the empty one; going on would find (1), which is better
    patient = {(): [0.5, 0.4, 0.1], (1,): [0.98, 0.01, 0.01], (2,): [0.4, 0.3, 0.3]}
    patient |= {text: [0.4, 0.3, 0.3] for n in (2, 3, 4) for text in itertools.product((1, 2), repeat=n)}
    slow = {text: [0.02, 0.9, 0.08] for n in range(5) for text in itertools.product((1, 2), repeat=n)}
    config = GenerationConfig("beam", beams=1, min_length=0, max_length=4)
    alone = beam_search(ToyDecoder([patient]), [9], 1, END, config, CPU)
    together = beam_search(ToyDecoder([patient, slow]), [9], 2, END, config, CPU)
    assert together[0] == alone[0]
    assert together[1].tokens == [1, 1, 1, 1]


def test_greedy_takes_the_most_probable_token() -> None:
    table = _random_table(4, 4, 6)
    [caption] = greedy(ToyDecoder([table]), [9], 1, END, GenerationConfig(min_length=2, max_length=5), CPU)
    text: list[int] = []
    while len(text) < 5:
        probabilities = np.array(table[tuple(text)])
        probabilities[END] *= len(text) >= 2
        token = int(probabilities.argmax())
        if token == END:
            break
        text.append(token)
    assert caption.tokens == text


def test_logprob_is_the_mean_over_the_tokens_with_the_end_counted(
    med: MED, tokenizer: Tokenizer, image: CrossKeys
) -> None:
    given = prompt_tokens(tokenizer, "a red")
    uniforms = torch.stack([row_uniforms(seed, 8) for seed in range(3)])
    captions = sample(CachedDecoder(med, image), given, uniforms, tokenizer.end_id, CONFIG)
    captions += beam_search(CachedDecoder(med, image), given, 3, tokenizer.end_id, CONFIG, CPU)
    for row, caption in enumerate(captions):
        tokens = [*given, *caption.tokens]
        if len(tokens) - 1 < CONFIG.max_length:
            tokens.append(tokenizer.end_id)
        predicted = med.decode(image.select(slice(row % 3, row % 3 + 1)), torch.tensor([tokens]), None)[0].log_softmax(
            dim=-1
        )
        places = range(len(given), len(tokens))
        expected = np.mean([predicted[place - 1, tokens[place]].item() for place in places])
        assert caption.logprob == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["nucleus", "beam", "greedy"])
def test_captions_keep_to_the_lengths(method: str) -> None:
    eager = {text: [0.9, 0.06, 0.04] for n in range(6) for text in itertools.product((1, 2), repeat=n)}
    endless = {text: [1e-9, 0.6, 0.4] for text in eager}
    config = GenerationConfig(min_length=3, max_length=5)

    def lengths(table: dict[tuple[int, ...], list[float]], prompt: list[int]) -> set[int]:
        decoder = ToyDecoder([table] * 20)
        if method == "nucleus":
            uniforms = torch.stack([row_uniforms(seed, 5) for seed in range(20)])
            captions = sample(decoder, prompt, uniforms, END, config)
        elif method == "beam":
            captions = beam_search(decoder, prompt, 20, END, replace(config, beams=2), CPU)
        else:
            captions = greedy(decoder, prompt, 20, END, config, CPU)
        return {len(prompt) - 1 + len(caption.tokens) for caption in captions}

    assert min(lengths(eager, [9])) == 3
    assert min(lengths(eager, [9, 1])) == 3
    assert lengths(endless, [9]) == {5}
    assert lengths(endless, [9, 1, 2]) == {5}


def test_the_repetition_penalty_makes_seen_tokens_rarer() -> None:
    scores = torch.tensor([[-1.0, -2.0, -3.0, -0.5], [6.0, 3.0, -3.0, 0.0]])
    history = torch.tensor([[1, 3, 3], [1, 2, 3]])
    config = GenerationConfig(repetition_penalty=1.5, min_length=4)
    rarer = [[-1.0, -3.0, -3.0, -0.75], [6.0, 2.0, -4.5, 0.0]]
    assert restrict(scores, history, 4, 0, config).tolist() == rarer
    assert restrict(scores, history, 3, 0, config).tolist() == [[-math.inf, *row[1:]] for row in rarer]
    assert scores.tolist() == [[-1.0, -2.0, -3.0, -0.5], [6.0, 3.0, -3.0, 0.0]]
    loop = {text: [0.05, 0.6, 0.35] for n in range(4) for text in itertools.product((1, 2), repeat=n)}
    plain = GenerationConfig(min_length=0, max_length=3)
    varied = replace(plain, repetition_penalty=3.0)
    assert greedy(ToyDecoder([loop]), [9], 1, END, plain, CPU)[0].tokens == [1, 1, 1]
    assert greedy(ToyDecoder([loop]), [END], 1, END, varied, CPU)[0].tokens == [1, 2, 1]


def test_beams_find_a_better_text_than_greedy_does() -> None:
    # the likeliest opening leads nowhere
    table = {(): [0.01, 0.55, 0.44], (1,): [0.34, 0.33, 0.33], (2,): [0.98, 0.01, 0.01]}
    table |= {text: [0.4, 0.3, 0.3] for text in itertools.product((1, 2), repeat=2)}
    config = GenerationConfig("beam", beams=2, min_length=0, max_length=3)
    [hasty] = greedy(ToyDecoder([table]), [9], 1, END, config, CPU)
    [best] = beam_search(ToyDecoder([table]), [9], 1, END, config, CPU)
    assert hasty.tokens == [1]
    assert best.tokens == [2]
    assert best.logprob == pytest.approx((math.log(0.44) + math.log(0.98)) / 2)
    assert best.logprob > hasty.logprob


def test_with_enough_beams_the_search_is_exhaustive() -> None:
    tables = [_random_table(seed, 3, 4) for seed in range(10)]
    config = GenerationConfig("beam", beams=32, min_length=0, max_length=4)
    found = beam_search(ToyDecoder(tables), [9], 10, END, config, CPU)
    for table, caption in zip(tables, found, strict=True):
        best = _exhaustive(table, 3, 4)
        assert caption.tokens == best.tokens
        assert caption.logprob == pytest.approx(best.logprob, rel=1e-5)


def test_one_beam_without_end_is_greedy(med: MED, tokenizer: Tokenizer, image: CrossKeys) -> None:
    config = GenerationConfig(max_length=6, min_length=6, beams=1)
    with torch.inference_mode():
        one = beam_search(CachedDecoder(med, image), [tokenizer.decode_id], 3, tokenizer.end_id, config, CPU)
        other = greedy(CachedDecoder(med, image), [tokenizer.decode_id], 3, tokenizer.end_id, config, CPU)
    assert [caption.tokens for caption in one] == [caption.tokens for caption in other]


def test_the_prompt_opens_every_text_and_is_left_out_of_the_result(
    med: MED, tokenizer: Tokenizer, image: CrossKeys
) -> None:
    given = prompt_tokens(tokenizer, "a red")
    assert given == [tokenizer.decode_id, *tokenizer(["a red"]).ids[0, 1:-1].tolist()]
    [(text, _)] = generate(med, tokenizer, image.select(slice(1)), replace(CONFIG, method="greedy", prompt="a red"))
    [caption] = greedy(CachedDecoder(med, image.select(slice(1))), given, 1, tokenizer.end_id, CONFIG, CPU)
    assert text == tokenizer.decode(caption.tokens)


def test_a_caption_s_seed_depends_on_run_image_and_candidate_alone() -> None:
    seeds = {caption_seed(run, image, number) for run in (0, 1) for image in ("aa", "ab") for number in (1, 2, 12)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    # of sha256 the first 16 hexadecimal digits, without the lowest bit
    assert caption_seed(0, "aa", 1) == int(hashlib.sha256(b"0/aa/1").hexdigest()[:16], 16) // 2


def test_a_seed_s_numbers_are_the_same_for_any_length() -> None:
    assert torch.equal(row_uniforms(5, 8)[:4], row_uniforms(5, 4))
    assert ((row_uniforms(5, 1000) >= 0) & (row_uniforms(5, 1000) < 1)).all()
