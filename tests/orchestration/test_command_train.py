"""`capfilt train`: one training without Prefect, alone or in each process of a launch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blip_core.med.checkpoint import load_med

LAUNCHERS = {
    "alone": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
    ],
}


def launch(launcher: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *LAUNCHERS[launcher], "-m", "flows", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launch_trains_the_model_and_a_second_one_finds_it_standing(
    launcher: str, configure: Callable[..., Path], tmp_path: Path
) -> None:
    config = str(configure())
    first = launch(launcher, "med", config)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "workspace" / "rounds" / "0001" / "med"
    digest = load_med(folder).digest
    assert first.stderr.count(f"digest {digest}") == 1
    assert first.stderr.count("med: 12 of 12") == 1
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    if launcher == "alone":
        again = launch(launcher, "med", config)
        assert f"med: stands, digest {digest}" in again.stderr


def test_an_unknown_model_is_named_in_one_line(configure: Callable[..., Path]) -> None:
    answer = launch("alone", "mde", str(configure()))
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: train mde: no such model; it is one of med, captioner, filter")
    assert answer.stderr.count("\n") == 1
