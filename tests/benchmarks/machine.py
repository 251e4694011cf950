"""What the benchmarks say of the machine, and the rate of its matrix products."""

import os
import platform
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from blip_core.med.inference import OneDNNLinear

PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
PEAK_TRIES = 4


def now(device: torch.device) -> float:
    """Seconds, when all that was begun on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of several, by whichever library does it best."""
    size = PEAK_SIZE[device.type]
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    ways: list[Callable[[], torch.Tensor]] = [lambda: one @ other]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        linear = OneDNNLinear(size, size, bias=False)
        linear.weight = nn.Parameter(other)
        ways.append(lambda: linear(one))
    with torch.inference_mode():
        return max(2 * size**3 / _seconds(way, device) for way in ways for _ in range(PEAK_TRIES))


def _seconds(way: Callable[[], torch.Tensor], device: torch.device) -> float:
    began = now(device)
    way()
    return now(device) - began


def machine(device: torch.device) -> dict[str, Any]:
    """The device, its threads and cores, versions and date."""
    cpu = platform.processor()
    if (info := Path("/proc/cpuinfo")).is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        cpu = found.group(1) if found else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def every_word() -> list[str]:
    """Texts of so many different words that BERT's number of word pieces is full."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    words = [first + second + third for first in syllables for second in syllables for third in syllables[:4]]
    return [" ".join(words[start : start + 30]) for start in range(0, len(words), 30)]
