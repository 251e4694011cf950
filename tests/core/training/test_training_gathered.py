"""Gathered features give the loss and the gradient of one process that has the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from blip_core.data.pairs import PairSource

PROGRAM = str(Path(__file__).with_name("gathered.py"))


def step(processes: int, pairs: Path, target: Path) -> dict[str, torch.Tensor]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), PROGRAM, str(pairs), str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    return load_file(target)


def test_two_processes_have_the_losses_gradients_and_queue_of_one(sources: list[PairSource], tmp_path: Path) -> None:
    whole = step(1, sources[0].path, tmp_path / "whole.safetensors")
    shared = step(2, sources[0].path, tmp_path / "shared.safetensors")
    assert shared.keys() == whole.keys()
    assert {"loss.itc", "loss.itm", "loss.lm", "med.temperature", "med.itm_head.weight"} <= whole.keys()
    assert torch.equal(shared["queue.image_ids"], whole["queue.image_ids"])
    # texts of unlike length and images that come twice are among the pairs of either process
    assert len(set(whole["queue.image_ids"].tolist())) < 10
    apart = {name: (shared[name] - whole[name]).abs().max().item() for name in whole}
    assert max(apart.values()) < 1e-5, {name: value for name, value in apart.items() if value > 1e-5}
    assert whole["med.image_encoder.vit.patch_embed.proj.weight"].abs().max() > 1e-3
