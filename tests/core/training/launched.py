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
from blip_core.med.med import MEDConfig
from blip_core.med.tokenizer import TokenizerConfig
from blip_core.training.pretrain import pretrain
from blip_core.training.recipe import TrainConfig


def main(settings: dict) -> None:
    def killed(done: int, steps: int, losses: Mapping[str, float]) -> None:
        if done == settings.get("kill_after"):
            os.kill(os.getpid(), signal.SIGKILL)

    pretrain(
        Path(settings["target"]),
        [PairSource(Path(path)) for path in settings["sources"]],
        MEDConfig(**settings["med"]),
        TrainConfig(**settings["train"]),
        TokenizerConfig(**settings["tokenizer"]),
        settings["seed"],
        Path(settings["metrics"]),
        killed,
    )


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    main(json.loads(Path(sys.argv[1]).read_text()))
