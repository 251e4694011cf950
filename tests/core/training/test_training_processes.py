"""Two processes train what one would: the same curve and weights, in each layout, and over a kill."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blip_core.data.pairs import PairSource
from blip_core.med.architecture import MEDConfig
from blip_core.med.word_pieces import TokenizerConfig
from blip_core.training.recipe import TrainConfig

PROGRAM = Path(__file__).with_name("launched.py")
CONFIG = TrainConfig(
    steps=6,
    batch_size=8,
    learning_rate=2e-3,
    warmup_steps=2,
    queue_size=10,
    momentum=0.9,
    alpha_ramp_steps=6,
    save_every=2,
    log_every=1,
    lanes=4,
)
Run = Callable[..., "Outcome"]


class Outcome:
    """A finished process tree, and what it left."""

    def __init__(self, target: Path, status: int, errors: str) -> None:
        self.target = target
        self.status = status
        self.errors = errors

    def curve(self) -> list[list[float]]:
        rows = [json.loads(line) for line in self.target.with_suffix(".jsonl").read_text().splitlines()]
        names = [name for name in ("itc", "itm", "lm", "gradient_norm") if rows[0][name] is not None]
        return [[row[name] for name in names] for row in rows]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.target / "model.safetensors")


@pytest.fixture(scope="module")
def run(sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig) -> Run:
    # two processes draw their dropout apart, as they should
    med = asdict(replace(sizes, dropout=0.0, drop_path=0.0))

    def launch(root: Path, processes: int, config: TrainConfig, model: str = "med", **more: Any) -> Outcome:
        root.mkdir(parents=True, exist_ok=True)
        settings = {
            "target": str(root / model),
            "metrics": str(root / f"{model}.jsonl"),
            "sources": [str(source.path) for source in sources],
            "med": med,
            "train": asdict(config),
            "tokenizer": asdict(words),
            "seed": 3,
            **more,
        }
        (root / "settings.json").write_text(json.dumps(settings))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), str(PROGRAM), str(root / "settings.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
        return Outcome(root / model, ended.returncode, ended.stderr)

    return launch


@pytest.fixture(scope="module")
def alone(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = run(tmp_path_factory.mktemp("alone"), 1, CONFIG)
    assert outcome.status == 0, outcome.errors
    return outcome


def assert_same(outcome: Outcome, other: Outcome, tolerance: float) -> None:
    assert outcome.status == 0, outcome.errors
    assert torch.allclose(torch.tensor(outcome.curve()), torch.tensor(other.curve()), atol=tolerance)
    weights, expected = outcome.weights(), other.weights()
    assert weights.keys() == expected.keys()
    # AdamW's first steps have the size of the rate whatever the gradient's: noise of a zero gradient is enlarged
    apart = {name: (weights[name] - expected[name]).abs().max().item() for name in expected}
    assert max(apart.values()) < 100 * tolerance, apart


@pytest.mark.parametrize(
    "changes",
    [{}, {"parallel": "fsdp"}, {"workers": 2, "gradient_checkpointing": True}],
    ids=["ddp", "fsdp", "workers"],
)
def test_two_processes_give_the_result_of_one(
    run: Run, alone: Outcome, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert_same(run(tmp_path, 2, replace(CONFIG, **changes)), alone, 1e-4)


@pytest.mark.parametrize(("model", "parallel"), [("captioner", "ddp"), ("filter", "fsdp")])
def test_two_processes_fine_tune_as_one_does_though_a_face_is_idle(
    run: Run, alone: Outcome, tmp_path: Path, model: str, parallel: str
) -> None:
    config = replace(CONFIG, steps=3)
    whole = run(tmp_path / "one", 1, config, model, start=str(alone.target))
    assert whole.status == 0, whole.errors
    together = replace(config, parallel=parallel)
    assert_same(run(tmp_path / "two", 2, together, model, start=str(alone.target)), whole, 1e-4)


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 2), (2, 1)], ids=["one", "two", "two-then-one"])
def test_a_training_killed_at_any_step_goes_on_as_if_nothing_had_happened(
    run: Run, alone: Outcome, tmp_path: Path, first: int, second: int
) -> None:
    killed = run(tmp_path, first, CONFIG, kill_after=5)
    assert killed.status != 0
    assert not (tmp_path / "med").exists()
    (saved,) = (tmp_path / ".med.training").iterdir()
    assert saved.name == "000000004"
    ended = run(tmp_path, second, CONFIG)
    assert_same(ended, alone, 1e-6 if first == second == 1 else 1e-4)
    assert not saved.parent.exists()


def test_negatives_of_the_own_process_are_another_training(run: Run, alone: Outcome, tmp_path: Path) -> None:
    outcome = run(tmp_path, 2, replace(CONFIG, negatives="process"))
    assert outcome.status == 0, outcome.errors
    ours, theirs = outcome.curve()[0], alone.curve()[0]
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)  # ITC sees the pairs of all
    assert ours[1] != pytest.approx(theirs[1], abs=1e-5)


def test_a_batch_that_does_not_divide_is_refused_in_one_sentence(run: Run, tmp_path: Path) -> None:
    outcome = run(tmp_path, 2, replace(CONFIG, batch_size=7))
    assert outcome.status != 0
    assert "a batch of 7 pairs does not divide among 2 processes" in outcome.errors
