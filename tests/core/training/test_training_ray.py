"""Two Ray workers train what one process trains, over a death, and their errors read like anyone's."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip_core.cluster import ENVIRONMENT
from blip_core.data.pairs import PairSource
from blip_core.errors import ConfigError, TrainingError
from blip_core.med.architecture import MEDConfig
from blip_core.med.word_pieces import TokenizerConfig
from blip_core.training.on_ray import train_on_ray
from blip_core.training.pretrain import pretrain
from blip_core.training.recipe import TrainConfig
from blip_core.training.run import TrainSummary
from blip_core.training.train import Progress

# Ray's own import
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
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
Prepared = Callable[..., Callable[[], TrainSummary]]


@pytest.fixture
def training(sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig) -> Prepared:
    """A pre-training with all but its place. Two processes draw their dropout apart, so there is none."""
    plain = replace(sizes, dropout=0.0, drop_path=0.0)

    def prepared(target: Path, config: TrainConfig = CONFIG, progress: Progress | None = None) -> partial[TrainSummary]:
        metrics = target.with_suffix(".jsonl")
        return partial(pretrain, target, sources, plain, config, words, 3, metrics, progress)

    return prepared


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, with two cores to its name."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        environment.setenv("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "1")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


def killed_after(steps: tuple[int, ...], notes: Path) -> Progress:
    """Ends the process by a signal after each of the steps, unless there is a note that this has been done."""

    def progress(done: int, last: int, losses: Mapping[str, float]) -> None:
        note = notes / str(done)
        if done in steps and not note.exists():
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if done == last:
            warnings.warn("the last step", UserWarning, stacklevel=1)

    return progress


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, training: Prepared, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"^Ray: ray is not installed; pip install capfilt\[ray\]$"):
        train_on_ray(training(tmp_path / "med"), 2)


def test_a_cluster_that_is_not_there_is_named(training: Prepared, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"^Ray: no cluster at 'nowhere'"):
        train_on_ray(training(tmp_path / "med"), 2, address="nowhere")


def test_an_error_of_the_training_comes_out_as_itself_and_the_cluster_begun_for_it_ends(
    training: Prepared, tmp_path: Path
) -> None:
    ray = pytest.importorskip("ray")
    uneven = training(tmp_path / "med", replace(CONFIG, accumulation=3))
    assert not os.environ.keys() & ENVIRONMENT.keys()
    interrupts = signal.getsignal(signal.SIGINT)
    with pytest.raises(ConfigError, match=r"^med\.batch_size 8 must be a multiple of med\.accumulation 3$") as caught:
        train_on_ray(uneven, 1)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert not ray.is_initialized()
    assert not os.environ.keys() & ENVIRONMENT.keys()
    assert signal.getsignal(signal.SIGINT) is interrupts


def test_more_workers_than_the_cluster_has_room_for_are_refused(
    cluster: None, training: Prepared, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"^workers: 3 workers need a CPU each, and the Ray cluster has 2; "):
        train_on_ray(training(tmp_path / "med"), 3)
    with pytest.raises(TrainingError, match=r"^workers: 2 workers need a GPU each, and the Ray cluster has 0; "):
        train_on_ray(training(tmp_path / "med"), 2, use_gpu=True)


def test_two_workers_end_what_one_began_as_one_process_would(cluster: None, training: Prepared, tmp_path: Path) -> None:
    training(tmp_path / "alone")()
    begun = training(tmp_path / "begun", progress=killed_after((1, 3), tmp_path))
    with pytest.raises(TrainingError, match=r"^training on Ray: worker 0: ActorDiedError: The actor died unexpectedly"):
        train_on_ray(begun, 1, restarts=1)
    assert (tmp_path / "3").exists()
    with pytest.warns(UserWarning, match="^the last step$"):
        summary = train_on_ray(begun, 2)
    assert (summary.steps, summary.skipped, summary.main) == (6, False, True)
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("begun", "alone"))
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-3)
