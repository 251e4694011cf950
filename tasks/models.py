"""The Captioner and the Filter of a configuration, loaded once for a process. Imports no Prefect."""

import threading
from functools import lru_cache
from pathlib import Path

import torch

from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.config import BootstrapConfig
from blip_core.med.inference import Precision
from blip_core.med.sources import find_weights, locate
from tasks.workplace import captioner_source, filter_source, tokenizer_source

State = tuple[tuple[str, int, int], ...]

_loading = threading.Lock()


def device() -> str:
    """Where the models work: the accelerator where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_models(config: BootstrapConfig) -> tuple[Captioner, Filter]:
    """Both models, as `annotate.precision` and `annotate.compile` say. Raises CheckpointError as `load_med` does."""
    settings = (config.annotate.precision, config.annotate.compile)
    captioner, filter = captioner_source(config), filter_source(config)
    words = [tokenizer_source(config, source) for source in (captioner, filter)]
    with _loading:
        return (
            _captioner(captioner, _state(captioner), words[0], device(), *settings),
            _filter(filter, _state(filter), words[1], device(), *settings),
        )


def _state(source: str | Path) -> State:
    """Name, size and time of writing of the weights' files."""
    path = locate(source)
    files = [path] if path.is_file() else find_weights(path)
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


# The state is part of the key: a checkpoint that changed on disk is loaded anew.
@lru_cache(maxsize=1)
def _captioner(
    source: str | Path, state: State, tokenizer: str | None, device: str, precision: Precision, compile: bool
) -> Captioner:
    return Captioner.load(source, device, precision, tokenizer, compile)


@lru_cache(maxsize=1)
def _filter(
    source: str | Path, state: State, tokenizer: str | None, device: str, precision: Precision, compile: bool
) -> Filter:
    return Filter.load(source, device, tokenizer=tokenizer, precision=precision, compile=compile)
