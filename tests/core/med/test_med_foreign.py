"""Checkpoints of others: the ways in which transformers leaves one, and what comes of them here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
)

from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.data.transforms import eval_transform
from blip_core.errors import CheckpointError, ConfigError
from blip_core.med import sources
from blip_core.med.checkpoint import LoadedMED, load_med, save_med
from blip_core.med.convert import write_release, write_transformers
from blip_core.med.decoding import GenerationConfig
from blip_core.med.description import read_checkpoint_config
from blip_core.med.generation import generate
from blip_core.med.med import MED

Weights = dict[str, Tensor]


def same(found: MED, expected: MED) -> bool:
    """Whether all that the first one has is as in the second."""
    own = expected.state_dict()
    return all(torch.equal(tensor, own[name]) for name, tensor in found.state_dict().items())


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def reconfigure(folder: Path, part: str | None = None, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    (values[part] if part else values).update(changes)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_a_model_of_one_face_is_read_written_and_read_again(
    written: Path, blip: LoadedMED, kind: str, tmp_path: Path
) -> None:
    face = {"captioner": "decoder", "filter": "encoder"}[kind]
    for source in (written / kind, written / f"{kind}.pth"):
        loaded = load_med(source, tokenizer=written / "words")
        assert loaded.med.faces == (face,)
        assert same(loaded.med, blip.med)
        digest = save_med(tmp_path / "own", loaded.med, loaded.architecture, loaded.tokenizer, {"start": loaded.digest})
        again = load_med(tmp_path / "own")
        assert (again.digest, again.med.faces, again.config["faces"]) == (digest, (face,), [face])
        assert same(again.med, blip.med)


def test_a_transformers_model_brings_sizes_tokenizer_and_a_digest_of_its_weights(
    written: Path, blip: LoadedMED
) -> None:
    loaded = load_med(written / "filter")
    assert loaded.architecture == blip.architecture
    assert loaded.tokenizer.pieces.get_vocab() == blip.tokenizer.pieces.get_vocab()
    assert loaded.tokenizer.max_tokens == 20
    assert loaded.med.temperature.tolist() == pytest.approx([0.07])
    config = read_checkpoint_config(written / "filter")
    assert config == loaded.config
    assert (config["digest"], config["format"]) == (loaded.digest, "transformers' BlipForImageTextRetrieval")
    assert loaded.digest != load_med(written / "captioner").digest


def test_weights_in_several_files_or_in_a_torch_file_are_the_same_model(
    written: Path, blip: LoadedMED, tmp_path: Path
) -> None:
    model = BlipForConditionalGeneration.from_pretrained(written / "captioner")
    sharded, torch_file = tmp_path / "sharded", tmp_path / "torch"
    for folder in (sharded, torch_file):
        shutil.copytree(written / "captioner", folder)
        (folder / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="200KB")
    torch.save(model.state_dict(), torch_file / "pytorch_model.bin")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for folder in (sharded, torch_file):
        assert same(load_med(folder).med, blip.med)
    next(iter(sharded.glob("model-00001-*"))).unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: 1 of its \d+ files are missing, such as model-00001"):
        load_med(sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json: not an index of weights"):
        load_med(sharded)


def test_half_precision_is_widened(captioner: Path) -> None:
    rewrite(captioner, lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    assert {tensor.dtype for tensor in load_med(captioner).med.state_dict().values()} == {torch.float32}


def test_what_older_versions_saved_besides_is_known(captioner: Path, blip: LoadedMED) -> None:
    def older(weights: Weights) -> Weights:
        # the tied weights under their other names, and a buffer
        moved = dict(weights)
        moved["text_decoder.cls.predictions.decoder.weight"] = moved.pop(
            "text_decoder.bert.embeddings.word_embeddings.weight"
        )
        moved["text_decoder.cls.predictions.decoder.bias"] = moved["text_decoder.cls.predictions.bias"].clone()
        moved["text_decoder.bert.embeddings.position_ids"] = torch.arange(512)[None]
        return moved

    rewrite(captioner, older)
    assert same(load_med(captioner).med, blip.med)


def test_transformers_own_epsilon_is_taken_for_the_one_that_the_weights_were_trained_with(captioner: Path) -> None:
    reconfigure(captioner, "vision_config", layer_norm_eps=1e-5)
    assert load_med(captioner).med.image_encoder.vit.norm.eps == 1e-6
    reconfigure(captioner, "vision_config", layer_norm_eps=1e-3)
    with pytest.raises(CheckpointError, match=r"vision_config\.layer_norm_eps is 0\.001, expected 1e-06 or 1e-05"):
        load_med(captioner)


@torch.inference_mode()
def test_another_image_size_gives_what_theirs_gives_with_positions_interpolated(written: Path) -> None:
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(3))
    theirs = BlipForImageTextRetrieval.from_pretrained(written / "filter").eval().vision_model
    ours = load_med(written / "filter", image_size=40).med.encode_image(images)
    assert torch.allclose(ours, theirs(images, interpolate_pos_encoding=True).last_hidden_state, atol=1e-4)
    with pytest.raises(ConfigError, match="image size 20: must be a multiple of the patch size 8"):
        load_med(written / "filter", image_size=20)


@torch.inference_mode()
def test_their_processor_and_model_write_the_captions_that_ours_writes(written: Path, blip: LoadedMED) -> None:
    processor = AutoProcessor.from_pretrained(written / "captioner")
    model = BlipForConditionalGeneration.from_pretrained(written / "captioner").eval()
    picture = Image.effect_noise((50, 30), 90).convert("RGB")
    pixels = eval_transform(16)(picture)[None]
    assert torch.allclose(
        BlipImageProcessorPil.from_pretrained(written / "captioner")(picture, return_tensors="pt").pixel_values,
        pixels,
        atol=1e-5,
    )
    theirs = processor.decode(model.generate(pixels, min_length=3, max_length=9)[0], skip_special_tokens=True)
    image = blip.med.cross_keys(blip.med.encode_image(pixels))
    ((ours, _),) = generate(blip.med, blip.tokenizer, image, GenerationConfig("greedy", max_length=8, min_length=2))
    assert theirs.strip() == ours
    batch = processor(picture, "a red circle", return_tensors="pt")
    assert torch.equal(batch.input_ids, blip.tokenizer(["a red circle"]).ids)


def test_a_face_that_a_checkpoint_lacks_is_named(written: Path) -> None:
    with pytest.raises(CheckpointError, match=r"filter: has no text decoder; it can score texts, not write captions"):
        Captioner.load(written / "filter")
    with pytest.raises(
        CheckpointError, match=r"captioner: has no text encoder; it can write captions, not score texts"
    ):
        Filter.load(written / "captioner")
    assert Captioner.load(written / "captioner").digest == read_checkpoint_config(written / "captioner")["digest"]
    assert Filter.load(written / "filter", image_size=24).med.image_size == 24


def test_a_face_that_is_not_there_is_not_written(written: Path, tmp_path: Path) -> None:
    loaded = load_med(written / "captioner")
    for write in (write_transformers, write_release):
        with pytest.raises(CheckpointError, match="no text encoder"):
            write(tmp_path / "filter", loaded, "filter")
    assert not list(tmp_path.iterdir())


def test_a_name_on_the_hub_is_fetched_without_what_is_not_needed(
    written: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything = ["README.md", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin", "model.safetensors"]
    wanted: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/blip-captioner"
        wanted.append(
            list(filter_repo_objects([*everything, "config.json", "vocab.txt"], allow_patterns=allow_patterns))
        )
        return str(tmp_path if len(wanted) == 1 else written / "captioner")

    monkeypatch.setattr(sources, "snapshot_download", fetch)
    assert Captioner.load("someone/blip-captioner").digest == load_med(written / "captioner").digest
    # the torch file is asked for where there is no safetensors file
    assert wanted == [
        ["README.md", "model.safetensors", "config.json", "vocab.txt"],
        ["README.md", "pytorch_model.bin", "config.json", "vocab.txt"],
    ]


def test_without_a_network_a_name_gives_one_error_that_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"checkpoint someone/no-such-model: no folder or file here.*give the path of a folder"
    ):
        load_med("someone/no-such-model")


def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path: Path) -> None:
    for missing in (tmp_path / "nothing", tmp_path / "nothing.pth"):
        with pytest.raises(CheckpointError, match=r"nothing(\.pth)?: not found; expected a checkpoint folder"):
            load_med(missing)
