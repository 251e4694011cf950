"""A tokenizer learnt from a few words and a MED of two layers, small enough for every test to have its own."""

import pytest
import torch

from blip_core.med.med import MED, Architecture, build_med
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
