"""Fine-tuning goes on from models of transformers', which have one face only."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blip_core.data.pairs import PairSource
from blip_core.errors import CheckpointError
from blip_core.med.architecture import MEDConfig
from blip_core.med.checkpoint import LoadedMED, load_med
from blip_core.med.convert import Kind, write_transformers
from blip_core.med.description import read_checkpoint_config
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer
from blip_core.training.finetune import finetune_captioner, finetune_filter
from blip_core.training.recipe import TrainConfig
from blip_core.training.run import TrainSummary

CONFIG = TrainConfig(steps=2, batch_size=4, warmup_steps=0, learning_rate=1e-3, crop_scale=1.0, flip=False)
TRAININGS: dict[Kind, Callable[..., TrainSummary]] = {"captioner": finetune_captioner, "filter": finetune_filter}


@pytest.fixture
def full(sizes: MEDConfig) -> LoadedMED:
    words = Tokenizer.train(["a red circle", "one square that is blue", "a white bar"], vocabulary=100, max_tokens=12)
    torch.manual_seed(0)
    med = build_med(sizes.architecture(), len(words), words.encode_id, words.decode_id)
    return LoadedMED(med, words, "", sizes.architecture(), {})


@pytest.mark.parametrize(("kind", "face"), [("captioner", "decoder"), ("filter", "encoder")])
def test_a_model_of_one_face_is_fine_tuned_in_that_face(
    full: LoadedMED, sources: list[PairSource], tmp_path: Path, kind: Kind, face: str
) -> None:
    start, target = tmp_path / "start", tmp_path / kind
    write_transformers(start, full, kind)
    TRAININGS[kind](target, start, sources, CONFIG, 0, tmp_path / "metrics.jsonl")
    trained = load_med(target)
    assert trained.med.faces == (face,)
    assert trained.config["start"] == read_checkpoint_config(start)["digest"]
    before = full.med.state_dict()
    changed = {name for name, tensor in trained.med.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(f"self_attention.{face}" in name for name in changed)


def test_a_face_that_is_not_there_cannot_be_fine_tuned(
    full: LoadedMED, sources: list[PairSource], tmp_path: Path
) -> None:
    write_transformers(tmp_path / "start", full, "filter")
    with pytest.raises(CheckpointError, match="no text decoder"):
        finetune_captioner(tmp_path / "c", tmp_path / "start", sources, CONFIG, 0, tmp_path / "metrics.jsonl")
    assert not (tmp_path / "c").exists()
