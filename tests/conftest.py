"""What tests of several folders share: models as others publish them, and an object store."""

import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from services.s3 import S3

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = [
    *("a large red circle on a white background", "a small blue square in a green frame", "buy now cheap offers"),
    *("a medium yellow star on a black background", "a photograph of a purple ring", "click here for orange triangles"),
    *LETTERS,
]


def pytest_configure() -> None:
    """Lets the programs that tests start be interrupted, which a shell's & takes from pytest and all its children.

    A Prefect worker makes SIGINT of the SIGTERM that it gets, and would ignore both.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `captioner` and `filter`, random small models that transformers saved as on its hub."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval

    folder = tmp_path_factory.mktemp("published")
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(TEXTS, vocab_size=200, min_frequency=1, show_progress=False)
    pieces.save_model(str(folder))
    words = BertTokenizerFast.from_pretrained(folder, model_max_length=512)
    special = {"bos_token_id": len(words), "sep_token_id": words.sep_token_id, "eos_token_id": words.sep_token_id}
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BlipConfig(
        text_config={**sizes, **special, "pad_token_id": words.pad_token_id, "vocab_size": len(words) + 2},
        vision_config={**sizes, "image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6},
        image_text_hidden_size=16,
    )
    for name, kind in (("captioner", BlipForConditionalGeneration), ("filter", BlipForImageTextRetrieval)):
        torch.manual_seed(len(name))
        model = kind(config)
        with torch.no_grad():
            for parameter in model.parameters():  # with opinions, so that some texts pass and others do not
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator["S3"]:
    """An object store that speaks S3; this process's clients of S3 are led to it."""
    from services.s3 import s3

    with s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def make_bucket(store: "S3") -> Callable[[], str]:
    """Makes an empty bucket and returns its URL."""
    import fsspec

    def make() -> str:
        name = f"bucket-{secrets.token_hex(4)}"
        fsspec.filesystem("s3").mkdir(name)
        return f"s3://{name}"

    return make


@pytest.fixture
def bucket(make_bucket: Callable[[], str]) -> str:
    """The URL of an empty bucket."""
    return make_bucket()
