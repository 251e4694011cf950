"""A tokenizer learnt from a few words and a MED of two layers, small enough for every test to have its own.

And a MED as others write it: its heads are as wide as those of the original release, whose files do not count them.
"""

import shutil
from pathlib import Path

import pytest
import torch

from blip_core.med.architecture import Architecture
from blip_core.med.checkpoint import LoadedMED
from blip_core.med.convert import Kind, write_release, write_transformers
from blip_core.med.med import MED, build_med
from blip_core.med.tokenizer import Tokenizer

ARCHITECTURE = Architecture(
    image_size=16,
    patch_size=8,
    image_width=32,
    image_depth=1,
    image_heads=2,
    text_width=32,
    text_depth=2,
    text_heads=2,
    projection=16,
    drop_path=0.0,
    dropout=0.0,
)
BLIP_ARCHITECTURE = Architecture(16, 8, 64, 2, 1, 64, 2, 1, 16, 0.0, 0.1)
WORDS = ("a red circle", "a blue square", "two green rings", "a yellow star under a red cross")


def loud(med: MED) -> MED:
    """The same with wider weights, so that a random model has opinions: logits far apart, images that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        med.temperature.fill_(0.07)
    return med


@pytest.fixture
def architecture() -> Architecture:
    return ARCHITECTURE


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(WORDS, vocabulary=100, max_tokens=20)


@pytest.fixture
def med(tokenizer: Tokenizer) -> MED:
    torch.manual_seed(0)
    return loud(build_med(ARCHITECTURE, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def blip(tokenizer: Tokenizer) -> LoadedMED:
    torch.manual_seed(0)
    med = loud(build_med(BLIP_ARCHITECTURE, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id)).eval()
    return LoadedMED(med, tokenizer, "0" * 16, BLIP_ARCHITECTURE, {})


@pytest.fixture(scope="session")
def written(blip: LoadedMED, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captioner and filter (transformers'), captioner.pth and filter.pth (the release's), and words."""
    folder = tmp_path_factory.mktemp("written")
    kinds: tuple[Kind, ...] = ("captioner", "filter")
    for kind in kinds:
        write_transformers(folder / kind, blip, kind)
        write_release(folder / f"{kind}.pth", blip, kind)
    blip.tokenizer.save(folder / "words")
    return folder


@pytest.fixture
def captioner(written: Path, tmp_path: Path) -> Path:
    """A captioner's folder of transformers', to be spoilt."""
    return Path(shutil.copytree(written / "captioner", tmp_path / "captioner"))
