"""Checkpoints: what is loaded is what was saved, or an error that names file and weight."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip_core.errors import CheckpointError, ConfigError
from blip_core.med.architecture import Architecture
from blip_core.med.checkpoint import load_med, save_med
from blip_core.med.description import read_checkpoint_config
from blip_core.med.med import MED
from blip_core.med.tokenizer import Tokenizer


@pytest.fixture
def saved(tmp_path: Path, med: MED, architecture: Architecture, tokenizer: Tokenizer) -> Path:
    save_med(tmp_path / "med", med, architecture, tokenizer, {"steps": 7, "fingerprint": "cafe"})
    return tmp_path / "med"


@torch.inference_mode()
def test_a_loaded_model_gives_the_saved_one_s_outputs(
    saved: Path, med: MED, tokenizer: Tokenizer, images: Tensor, architecture: Architecture
) -> None:
    loaded = load_med(saved)
    ids, mask = tokenizer(["a red circle", "two rings", "a star"])
    assert torch.equal(loaded.tokenizer(["a red circle", "two rings", "a star"]).ids, ids)
    features = med.encode_image(images)
    image = med.cross_keys(features)
    assert torch.equal(loaded.med.encode_image(images), features)
    assert torch.equal(loaded.med.match(loaded.med.cross_keys(features), ids, mask), med.match(image, ids, mask))
    assert torch.equal(loaded.med.decode(loaded.med.cross_keys(features), ids, mask), med.decode(image, ids, mask))
    assert torch.equal(loaded.med.embed_text(ids, mask), med.embed_text(ids, mask))
    assert not loaded.med.training
    assert loaded.architecture == architecture
    assert (loaded.config["steps"], loaded.config["fingerprint"]) == (7, "cafe")


def test_the_digest_is_the_weights(
    saved: Path, tmp_path: Path, med: MED, architecture: Architecture, tokenizer: Tokenizer
) -> None:
    digest = load_med(saved).digest
    assert save_med(tmp_path / "same", med, architecture, tokenizer, {"steps": 8}) == digest
    with torch.no_grad():
        med.itm_head.bias += 1e-3
    assert save_med(tmp_path / "other", med, architecture, tokenizer, {}) != digest


def test_a_checkpoint_is_replaced_whole_and_leaves_nothing_beside_it(
    saved: Path, med: MED, architecture: Architecture, tokenizer: Tokenizer
) -> None:
    (saved / "old.txt").write_text("of the last checkpoint")
    save_med(saved, med, architecture, tokenizer, {})
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in saved.iterdir()) == names
    assert [path.name for path in saved.parent.iterdir()] == ["med"]


def test_no_part_of_a_checkpoint_is_a_pickle(saved: Path) -> None:
    for path in saved.iterdir():
        data = path.read_bytes()
        if path.suffix == ".json":
            json.loads(data)
        else:
            header = int.from_bytes(data[:8], "little")
            assert path.name == "model.safetensors"
            assert isinstance(json.loads(data[8 : 8 + header]), dict)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_an_incomplete_folder_is_no_checkpoint(saved: Path, missing: str) -> None:
    (saved / missing).unlink()
    for read in (load_med, read_checkpoint_config):
        with pytest.raises(CheckpointError, match=rf"checkpoint .*med: no {missing}; expected "):
            read(saved)


def test_torn_weights_are_named(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"med/model\.safetensors: not a whole safetensors file"):
        load_med(saved)
    weights.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        load_med(saved)


def test_a_torn_configuration_is_named(saved: Path) -> None:
    config = saved / "config.json"
    whole = config.read_text()
    config.write_text(whole[:40])
    with pytest.raises(CheckpointError, match=r"config\.json: not a readable JSON file"):
        load_med(saved)
    values = json.loads(whole)
    del values["med"]["projection"]
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json: does not describe a MED .*projection"):
        load_med(saved)
    config.write_text(json.dumps({"digest": values["digest"]}))
    with pytest.raises(CheckpointError, match=r"config\.json: does not describe a MED"):
        load_med(saved)
    config.write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: does not describe a MED"):
        load_med(saved)
    del values["digest"]
    values["med"]["projection"] = 16
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json: does not describe a MED.*digest"):
        load_med(saved)


def test_missing_unknown_and_misshapen_weights_are_named(saved: Path) -> None:
    path = saved / "model.safetensors"
    weights = load_file(path)
    name = "text.layers.1.cross_attention.key.weight"

    def save(changed: dict[str, Tensor]) -> None:
        save_file(changed, path)

    save({key: tensor for key, tensor in weights.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: 1 weights are missing, the first is {name}"):
        load_med(saved)
    save({**weights, "text.pooler": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 weights are unknown, the first is text\.pooler"):
        load_med(saved)
    save({**weights, name: torch.zeros(32, 48)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(32, 48\); expected \(32, 32\)"):
        load_med(saved)


@pytest.mark.parametrize(
    ("size", "value", "named"),
    [
        ("text_depth", 0, r"text_depth is 0, expected 1 to 1000"),
        ("image_depth", 10**12, r"image_depth is 10{12}, expected 1 to 1000"),
        ("image_width", "wide", r"image_width is 'wide', expected 1 to "),
        ("dropout", -0.1, r"dropout is -0\.1, expected 0 to 1"),
        ("image_heads", 5, r"med\.image_width 32 must be a multiple of med\.image_heads 5"),
        ("projection", True, r"projection is True, expected 1 to"),
    ],
)
def test_sizes_that_no_model_can_have_are_named(saved: Path, size: str, value: object, named: str) -> None:
    config = saved / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "med": {**values["med"], size: value}}))
    with pytest.raises(CheckpointError, match=named):
        load_med(saved)


def test_faces_that_there_are_not_are_named(saved: Path) -> None:
    config = saved / "config.json"
    values = json.loads(config.read_text())
    assert values["faces"] == ["encoder", "decoder"]
    config.write_text(json.dumps({**values, "faces": ["encoder"]}))
    with pytest.raises(CheckpointError, match=r"weights are unknown, the first is text\.head_bias"):
        load_med(saved)
    config.write_text(json.dumps({**values, "faces": ["left"]}))
    with pytest.raises(CheckpointError, match=r"faces is \['left'\]; expected some of encoder, decoder"):
        load_med(saved)


def test_another_image_size_interpolates_positions_alone(saved: Path, med: MED) -> None:
    loaded = load_med(saved, image_size=32)
    assert (loaded.med.image_size, loaded.architecture.image_size) == (32, 32)
    assert loaded.med.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 32)
    own = med.state_dict()
    changed = [name for name, tensor in loaded.med.state_dict().items() if not torch.equal(tensor, own[name])]
    assert changed == ["image_encoder.vit.pos_embed"]
    with pytest.raises(ConfigError, match="image size 20: must be a multiple of the patch size 8"):
        load_med(saved, image_size=20)


def test_a_checkpoint_without_its_tokenizer_is_named(saved: Path) -> None:
    (saved / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer .*med: "):
        load_med(saved)


def test_a_checkpoint_of_another_vocabulary_is_refused(saved: Path) -> None:
    Tokenizer.train(["other words"], vocabulary=64, max_tokens=20).save(saved)
    with pytest.raises(CheckpointError, match=r"tokenizer .*med: 25 words; expected the 52 of the model in .*med"):
        load_med(saved)
