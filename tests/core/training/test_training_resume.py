"""Whole trainings: they learn, go on where they were killed as if nothing had happened, and are done only once."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from blip_core.data.pairs import PairSource, web_sources
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.errors import InputError, TrainingError
from blip_core.med.architecture import MEDConfig
from blip_core.med.checkpoint import load_med, save_med
from blip_core.med.description import read_checkpoint_config
from blip_core.med.word_pieces import TokenizerConfig
from blip_core.training.finetune import finetune_captioner, finetune_filter
from blip_core.training.pretrain import pretrain
from blip_core.training.recipe import TrainConfig
from blip_core.training.run import TrainSummary
from blip_core.training.train import Progress

CONFIG = TrainConfig(
    steps=9,
    batch_size=4,
    learning_rate=2e-3,
    warmup_steps=2,
    queue_size=10,
    momentum=0.9,
    alpha_ramp_steps=6,
    save_every=3,
    log_every=2,
)
Train = Callable[..., TrainSummary]


class KilledError(BaseException):
    """Stands for the signal that ends a process in the middle of a training."""


def kill_after(step: int) -> Progress:
    def progress(done: int, steps: int, losses: Mapping[str, float]) -> None:
        if done == step:
            raise KilledError

    return progress


class Place(NamedTuple):
    """A folder with a checkpoint and its curve."""

    target: Path
    metrics: Path

    def rows(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        return [
            {key: value for key, value in line.items() if key not in ("images_per_second", "data_wait")}
            for line in lines
        ]

    def weights(self) -> bytes:
        return (self.target / "model.safetensors").read_bytes()


def place(root: Path, name: str = "model") -> Place:
    return Place(root / name, root / "metrics" / f"{name}.jsonl")


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory, sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig
) -> Path:
    """A MED after two steps, which both fine-tunings begin with."""
    at = place(tmp_path_factory.mktemp("start"))
    pretrain(at.target, sources, sizes, replace(CONFIG, steps=2), words, 1, at.metrics)
    return at.target


@pytest.fixture
def trainings(start: Path, sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig) -> dict[str, Train]:
    def pretraining(at: Place, config: TrainConfig, seed: int, progress: Progress | None = None) -> TrainSummary:
        return pretrain(at.target, sources, sizes, config, words, seed, at.metrics, progress)

    def captioner(at: Place, config: TrainConfig, seed: int, progress: Progress | None = None) -> TrainSummary:
        return finetune_captioner(at.target, start, sources, config, seed, at.metrics, progress)

    def filter(at: Place, config: TrainConfig, seed: int, progress: Progress | None = None) -> TrainSummary:
        return finetune_filter(at.target, start, sources, config, seed, at.metrics, progress)

    return {"pretrain": pretraining, "captioner": captioner, "filter": filter}


OBJECTIVES = {"pretrain": ["itc", "itm", "lm"], "captioner": ["lm"], "filter": ["itc", "itm"]}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_killed_training_ends_as_an_unbroken_one(kind: str, trainings: dict[str, Train], tmp_path: Path) -> None:
    train, whole, killed = trainings[kind], place(tmp_path / "whole"), place(tmp_path / "killed")
    train(whole, CONFIG, 5)
    for step in (2, 5, 7):  # before the first save, between two, and after the last
        with pytest.raises(KilledError):
            train(killed, CONFIG, 5, kill_after(step))
        assert not killed.target.exists()
    seen: list[int] = []
    summary = train(killed, CONFIG, 5, lambda done, steps, losses: seen.append(done))
    assert seen == [7, 8, 9]
    assert killed.weights() == whole.weights()
    assert killed.rows() == whole.rows()
    assert summary.digest == read_checkpoint_config(whole.target)["digest"]
    assert [path.name for path in killed.target.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_training_is_done_once_and_again_when_a_setting_changes(
    kind: str, trainings: dict[str, Train], tmp_path: Path
) -> None:
    train, at = trainings[kind], place(tmp_path)
    short = replace(CONFIG, steps=2)
    first = train(at, short, 0)
    assert (first.skipped, first.steps) == (False, 2)
    again = train(at, short, 0, kill_after(1))
    assert (again.skipped, again.digest) == (True, first.digest)
    digests = {first.digest}
    for config, seed in ((replace(short, learning_rate=1e-3), 0), (short, 1)):
        changed = train(at, config, seed)
        assert not changed.skipped
        digests.add(changed.digest)
    assert len(digests) == 3
    assert train(at, short, 0).digest == first.digest


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_curve_has_the_losses_of_its_objectives(kind: str, trainings: dict[str, Train], tmp_path: Path) -> None:
    at = place(tmp_path, "named")
    trainings[kind](at, CONFIG, 0)
    rows = at.rows()
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 9]
    for row in rows:
        assert row["model"] == "named"
        assert [name for name in ("itc", "itm", "lm") if row[name] is not None] == OBJECTIVES[kind]
        assert row["loss"] == pytest.approx(sum(row[name] for name in OBJECTIVES[kind]))
    assert rows[0]["learning_rate"] == pytest.approx(2e-3)
    assert rows[-1]["learning_rate"] < rows[1]["learning_rate"]


def test_a_state_of_other_settings_is_not_resumed(trainings: dict[str, Train], tmp_path: Path) -> None:
    at, other = place(tmp_path / "a"), place(tmp_path / "b")
    with pytest.raises(KilledError):
        trainings["captioner"](at, CONFIG, 0, kill_after(4))
    changed = replace(CONFIG, weight_decay=0.1)
    seen: list[int] = []
    trainings["captioner"](at, changed, 0, lambda done, steps, losses: seen.append(done))
    trainings["captioner"](other, changed, 0)
    assert seen[0] == 1
    assert at.weights() == other.weights()
    assert at.rows() == other.rows()


def test_a_torn_state_is_named(trainings: dict[str, Train], tmp_path: Path) -> None:
    at = place(tmp_path)
    with pytest.raises(KilledError):
        trainings["captioner"](at, CONFIG, 0, kill_after(4))
    (state,) = (tmp_path / ".model.training").glob("*/state.safetensors")
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(TrainingError, match=r"\.model\.training/000000003/state\.safetensors: torn"):
        trainings["captioner"](at, CONFIG, 0)


def test_a_row_torn_by_a_kill_is_written_again(trainings: dict[str, Train], tmp_path: Path) -> None:
    whole, killed = place(tmp_path / "whole"), place(tmp_path / "killed")
    trainings["captioner"](whole, CONFIG, 0)
    with pytest.raises(KilledError):
        trainings["captioner"](killed, CONFIG, 0, kill_after(4))
    with killed.metrics.open("a") as file:
        file.write('{"model": "model", "step": 6, "lo')
    trainings["captioner"](killed, CONFIG, 0)
    assert killed.rows() == whole.rows()


def test_a_training_learns_from_a_few_pairs(
    sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig, tmp_path: Path
) -> None:
    at = place(tmp_path)
    config = replace(CONFIG, steps=40, batch_size=8, learning_rate=5e-3, log_every=5, alpha=0.0)
    config = replace(config, crop_scale=1.0, flip=False, save_every=1000)
    pretrain(at.target, sources, replace(sizes, dropout=0.0, drop_path=0.0), config, words, 0, at.metrics)
    rows = at.rows()
    assert rows[-1]["lm"] < 0.7 * rows[0]["lm"]
    assert rows[-1]["itc"] < 0.9 * rows[0]["itc"]


def test_fine_tuning_changes_its_own_face_and_leaves_the_other(
    start: Path, trainings: dict[str, Train], tmp_path: Path
) -> None:
    before = load_file(start / "model.safetensors")
    for kind, idle in (("captioner", "self_attention.encoder"), ("filter", "self_attention.decoder")):
        at = place(tmp_path / kind)
        trainings[kind](at, CONFIG, 0)
        after = load_file(at.target / "model.safetensors")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert not [name for name in changed if idle in name]
        assert "image_encoder.vit.patch_embed.proj.weight" in changed
        assert read_checkpoint_config(at.target)["start"] == read_checkpoint_config(start)["digest"]


def test_a_checkpoint_says_what_made_it(start: Path, sizes: MEDConfig) -> None:
    loaded = load_med(start)
    assert loaded.config["steps"] == 2
    assert loaded.config["seed"] == 1
    assert loaded.config["train"]["learning_rate"] == 2e-3
    assert loaded.architecture == sizes.architecture()
    assert loaded.tokenizer.max_tokens == 12


def test_a_loss_that_is_no_number_ends_the_training(start: Path, sources: list[PairSource], tmp_path: Path) -> None:
    loaded = load_med(start)
    with torch.no_grad():
        loaded.med.text.head_bias.fill_(torch.nan)
    broken = tmp_path / "broken"
    save_med(broken, loaded.med, loaded.architecture, loaded.tokenizer, {})
    at = place(tmp_path, "captioner")
    with pytest.raises(TrainingError, match=r"training of captioner: loss is \{'lm': nan\} at step 0"):
        finetune_captioner(at.target, broken, sources, CONFIG, 0, at.metrics)
    assert not at.target.exists()


def test_training_without_pairs_is_refused(
    start: Path, sizes: MEDConfig, words: TokenizerConfig, tmp_path: Path
) -> None:
    failed = tmp_path / "failed.parquet"
    rows = [{"uid": "a", "caption": "a red bar", "status": "failed", "reason": "not_found"}]
    write_shard(failed, [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", 1)
    at, empty = place(tmp_path), web_sources([failed])
    with pytest.raises(InputError, match=r"failed\.parquet"):
        finetune_captioner(at.target, start, empty, CONFIG, 0, at.metrics)
    with pytest.raises(InputError, match="no word"):
        pretrain(at.target, empty, sizes, CONFIG, words, 0, at.metrics)
    table = pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"training pairs: none found in .*none\.parquet"):
        finetune_filter(at.target, start, [PairSource(tmp_path / "none.parquet")], CONFIG, 0, at.metrics)
    assert not at.target.exists()


def test_trainings_of_both_precisions_may_follow_each_other(trainings: dict[str, Train], tmp_path: Path) -> None:
    at = place(tmp_path)
    short = replace(CONFIG, steps=2)
    exact = trainings["pretrain"](at, short, 0)
    assert trainings["pretrain"](at, replace(short, precision="bf16"), 0).digest != exact.digest
    weights = load_file(at.target / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
