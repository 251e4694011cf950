"""Switches that change how a step is computed change nothing, or little, in what comes out."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blip_core.data.pairs import PairSource, iterate_texts
from blip_core.data.stream import PairStream
from blip_core.data.transforms import eval_transform
from blip_core.med.architecture import MEDConfig
from blip_core.med.checkpoint import load_med
from blip_core.med.lm import predicted
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer
from blip_core.med.word_pieces import TokenizerConfig
from blip_core.training.finetune import finetune_captioner, finetune_filter
from blip_core.training.objectives import Captioning
from blip_core.training.pretrain import pretrain
from blip_core.training.recipe import TrainConfig

CONFIG = TrainConfig(
    steps=4, batch_size=8, learning_rate=2e-3, warmup_steps=2, queue_size=10, momentum=0.9, log_every=1
)
Curve = list[list[float]]
Pretrain = Callable[..., Curve]


def curve_of(metrics: Path) -> Curve:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [[row[name] for name in ("itc", "itm", "lm") if row[name] is not None] for row in rows]


@pytest.fixture(scope="module")
def curve(sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig, tmp_path_factory: Any) -> Pretrain:
    plain = replace(sizes, dropout=0.0, drop_path=0.0)

    def train(**changes: Any) -> Curve:
        root = tmp_path_factory.mktemp("switches")
        metrics = root / "med.jsonl"
        pretrain(root / "med", sources, plain, replace(CONFIG, **changes), words, 0, metrics)
        return curve_of(metrics)

    return train


@pytest.fixture(scope="module")
def plain(curve: Pretrain) -> Curve:
    return curve()


def test_gradient_checkpointing_and_workers_change_nothing(curve: Pretrain, plain: Curve) -> None:
    assert torch.allclose(torch.tensor(curve(gradient_checkpointing=True, workers=1)), torch.tensor(plain), atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_change_nothing(curve: Pretrain, plain: Curve) -> None:
    assert torch.allclose(torch.tensor(curve(compile=True)), torch.tensor(plain), atol=1e-4)


def test_mixed_precision_changes_little(curve: Pretrain, plain: Curve) -> None:
    mixed = torch.tensor(curve(precision="bf16"))
    assert torch.allclose(mixed, torch.tensor(plain), atol=0.05)
    assert not torch.equal(mixed, torch.tensor(plain))


def test_many_processes_settings_do_nothing_in_one(curve: Pretrain, plain: Curve) -> None:
    assert curve(parallel="fsdp", negatives="process") == plain


def test_micro_batches_of_the_captioner_add_up_to_the_whole_batch(
    sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig, tmp_path: Path
) -> None:
    quiet = replace(sizes, dropout=0.0, drop_path=0.0)
    pretrain(tmp_path / "med", sources, quiet, replace(CONFIG, steps=1), words, 0, tmp_path / "med.jsonl")
    curves = []
    for parts in (1, 4):
        metrics = tmp_path / f"{parts}.jsonl"
        config = replace(CONFIG, accumulation=parts, prompt="a picture of")
        finetune_captioner(tmp_path / f"{parts}", tmp_path / "med", sources, config, 0, metrics)
        curves.append(torch.tensor(curve_of(metrics)))
    # texts of many lengths: a mean of means would be another number
    assert torch.allclose(*curves, atol=1e-5)


def test_micro_batches_of_pretraining_contrast_their_own_pairs(curve: Pretrain, plain: Curve) -> None:
    ours = curve(accumulation=2)
    assert ours[0][2] == pytest.approx(plain[0][2], abs=1e-5)  # LM's mean is over all tokens of the step
    assert ours[0][0] != pytest.approx(plain[0][0], abs=1e-3)


def test_a_prompt_stands_before_every_caption_and_is_not_predicted(sources: list[PairSource], sizes: MEDConfig) -> None:
    words = Tokenizer.train([*iterate_texts(sources), "a picture of"], 100, 20)
    med = build_med(sizes.architecture(), len(words), words.encode_id, words.decode_id)
    captioning = Captioning(med, words, replace(CONFIG, prompt="a picture of"))
    pairs = next(PairStream(sources, 4, eval_transform(16), seed=0).batches())
    batch = captioning.tokenize(pairs, torch.device("cpu"))
    prompt = words.pieces("a picture of", add_special_tokens=False)["input_ids"]
    assert captioning.prompt_length == 1 + len(prompt) == 4
    for ids, mask, text in zip(batch.ids, batch.mask, pairs.texts, strict=True):
        assert ids[1:4].tolist() == prompt
        counted = predicted(mask[None], captioning.prompt_length)[0]
        assert words.decode(ids[1:][counted].tolist()) == text
        assert ids[1:][counted][-1].item() == words.end_id


def test_fine_tuning_at_another_image_size_interpolates_the_positions(
    sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig, tmp_path: Path
) -> None:
    pretrain(tmp_path / "med", sources, sizes, replace(CONFIG, steps=1), words, 0, tmp_path / "med.jsonl")
    config = replace(CONFIG, steps=1, image_size=32)
    finetune_filter(tmp_path / "filter", tmp_path / "med", sources, config, 0, tmp_path / "filter.jsonl")
    tuned = load_med(tmp_path / "filter")
    assert (tuned.architecture.image_size, tuned.med.image_size) == (32, 32)
    assert load_med(tmp_path / "med").med.image_size == 16
