"""The trackers of accelerate get what the metrics file gets: TensorBoard's and Weights & Biases' files, read back."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from blip_core.data.pairs import PairSource
from blip_core.errors import TrainingError
from blip_core.med.architecture import MEDConfig
from blip_core.med.word_pieces import TokenizerConfig
from blip_core.training.finetune import finetune_captioner
from blip_core.training.pretrain import pretrain
from blip_core.training.recipe import TrainConfig

# one process of a training: the pickled call of it
PROGRAM = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))()"
CONFIG = TrainConfig(
    steps=5, batch_size=4, learning_rate=2e-3, warmup_steps=2, queue_size=10, momentum=0.9, save_every=2, log_every=2
)
Curve = dict[tuple[str, int], float]
Pretrain = Callable[[TrainConfig], Path]


@pytest.fixture
def trained(sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig, tmp_path: Path) -> Pretrain:
    """Pre-trains; returns the folder of the metrics file `med.jsonl`."""

    def train(config: TrainConfig) -> Path:
        metrics = tmp_path / "metrics" / "med.jsonl"
        pretrain(tmp_path / "med", sources, sizes, config, words, 3, metrics)
        return metrics.parent

    return train


def metrics_file(path: Path) -> Curve:
    """Every number of the curve, by name and step, but for the sum of the losses."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (name, row["step"]): value
        for row in rows
        for name, value in row.items()
        if name not in ("model", "step", "loss") and value is not None
    }


def tensorboard_file(folder: Path) -> Curve:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (path,) = folder.glob("events.out.*")
    events = accumulator.EventAccumulator(str(path))
    events.Reload()
    return {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}


def records(path: Path) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format, a head of 7 bytes, then blocks of 32 KiB."""
    data, place, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_file(path: Path) -> tuple[Curve, dict[str, Any], str]:
    """The curve, the settings and the project of a run."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    curve, config, project = {}, {}, ""
    for data in records(path):
        record = messages.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            curve |= {(name, row["_step"]): value for name, value in row.items() if not name.startswith("_")}
        elif kind == "config":
            config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.config.update}
        elif kind == "run":
            project = record.run.project
    return curve, config, project


def test_tensorboard_shows_the_numbers_of_the_metrics_file_and_the_settings(trained: Pretrain) -> None:
    folder = trained(replace(CONFIG, trackers=("tensorboard",)))
    expected = metrics_file(folder / "med.jsonl")
    assert {name for name, _ in expected} >= {"itc", "itm", "lm", "learning_rate", "gradient_norm", "images_per_second"}
    assert tensorboard_file(folder / "capfilt-med") == pytest.approx(expected, rel=1e-6)
    (settings,) = (folder / "capfilt-med").glob("*/hparams.yml")
    assert yaml.safe_load(settings.read_text())["learning_rate"] == 2e-3


def test_each_model_has_a_run_of_its_own(trained: Pretrain, sources: list[PairSource], tmp_path: Path) -> None:
    config = replace(CONFIG, steps=2, trackers=("tensorboard",))
    folder = trained(config)
    finetune_captioner(tmp_path / "captioner", tmp_path / "med", sources, config, 3, folder / "captioner.jsonl")
    curve = tensorboard_file(folder / "capfilt-captioner")
    assert curve == pytest.approx(metrics_file(folder / "captioner.jsonl"), rel=1e-6)
    assert ("itm", 2) not in curve
    assert ("itm", 2) in tensorboard_file(folder / "capfilt-med")


def test_wandb_has_them_as_well_and_needs_no_network(
    trained: Pretrain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    folder = trained(replace(CONFIG, trackers=("wandb",)))
    (run,) = tmp_path.glob("**/offline-run-*/run-*.wandb")
    curve, settings, project = wandb_file(run)
    assert curve == pytest.approx(metrics_file(folder / "med.jsonl"), rel=1e-6)
    assert (settings["learning_rate"], settings["steps"], project) == (2e-3, 5, "capfilt-med")


def test_a_tracker_that_is_not_installed_is_named(trained: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainingError, match=r"^trackers: wandb is not installed; pip install wandb$"):
        trained(replace(CONFIG, trackers=("wandb",)))


def test_of_two_processes_one_tells_the_trackers_and_both_end_well(
    sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig, tmp_path: Path
) -> None:
    config = replace(CONFIG, trackers=("tensorboard",))
    call = partial(pretrain, tmp_path / "med", sources, sizes, config, words, 3, tmp_path / "med.jsonl")
    (tmp_path / "call").write_bytes(pickle.dumps(call))
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(tmp_path / "program.py"), str(tmp_path / "call")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "med" / "model.safetensors").exists()
    assert tensorboard_file(tmp_path / "capfilt-med") == pytest.approx(metrics_file(tmp_path / "med.jsonl"), rel=1e-6)
