"""One process of a training that a test launches: `launched.py SETTINGS.json`, alone or under torchrun."""

import json
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from blip_core.data.pairs import PairSource
from blip_core.med.architecture import MEDConfig
from blip_core.med.word_pieces import TokenizerConfig
from blip_core.training.finetune import finetune_captioner, finetune_filter
from blip_core.training.pretrain import pretrain
from blip_core.training.recipe import TrainConfig


def main(settings: dict) -> None:
    def killed(done: int, steps: int, losses: Mapping[str, float]) -> None:
        if done == settings.get("kill_after"):
            os.kill(os.getpid(), signal.SIGKILL)

    target, metrics, seed = Path(settings["target"]), Path(settings["metrics"]), settings["seed"]
    sources = [PairSource(Path(path)) for path in settings["sources"]]
    train = TrainConfig(**settings["train"])
    if start := settings.get("start"):
        finetune = {"captioner": finetune_captioner, "filter": finetune_filter}[target.name]
        finetune(target, Path(start), sources, train, seed, metrics, killed)
    else:
        sizes, words = MEDConfig(**settings["med"]), TokenizerConfig(**settings["tokenizer"])
        pretrain(target, sources, sizes, train, words, seed, metrics, killed)


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
