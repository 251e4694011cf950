"""Checkpoints that are spoilt, are of another model, or hold code: refused by an error that says what was found."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipModel,
)

from blip_core.errors import CheckpointError
from blip_core.med.checkpoint import load_med
from blip_core.med.description import read_checkpoint_config
from blip_core.med.tokenizer import Tokenizer

Weights = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def reconfigure(folder: Path, part: str | None = None, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    (values[part] if part else values).update(changes)
    path.write_text(json.dumps(values))


def blip_config(**vision: Any) -> BlipConfig:
    text = {"vocab_size": 52, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1}
    image = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 2}
    return BlipConfig(text_config=text | heads, vision_config=image | heads | vision)


def test_missing_unknown_and_misshapen_weights_are_named_as_they_are_in_the_file(captioner: Path) -> None:
    name = "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"
    original = load_file(captioner / "model.safetensors")
    rewrite(captioner, lambda weights: {key: tensor for key, tensor in weights.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: 1 weights are missing, the first is {name}"):
        load_med(captioner)
    rewrite(captioner, lambda _: {**original, "text_decoder.pooler": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 weights are unknown, the first is text_decoder\.pooler"):
        load_med(captioner)
    rewrite(captioner, lambda _: {**original, name: torch.zeros(64, 48)})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(64, 48\); expected \(64, 64\)"):
        load_med(captioner)
    rewrite(captioner, lambda _: {**original, name: torch.zeros(64, 64, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=rf"{name} holds torch\.int32; expected floating-point"):
        load_med(captioner)


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        ("vision_config", {"num_hidden_layers": 3}, r"has layers \(image, text\) \(2, 2\); .*promises \(3, 2\)"),
        ("text_config", {"num_hidden_layers": 1}, r"has layers \(image, text\) \(2, 2\); .*promises \(2, 1\)"),
        ("vision_config", {"image_size": 24}, r"position_embedding has shape \(1, 5, 64\); expected \(1, 10, 64\)"),
        ("vision_config", {"image_size": [16, 16]}, r"image_size is \[16, 16\], expected a multiple of its patch_size"),
        ("vision_config", {"patch_size": 5}, r"image_size is 16, expected a multiple of its patch_size 5"),
        ("text_config", {"num_attention_heads": 5}, r"hidden_size is 64, expected a multiple of its num_att.* 5"),
        ("text_config", {"hidden_act": "relu"}, r"text_config\.hidden_act is relu, expected gelu"),
        ("text_config", {"max_position_embeddings": 77}, r"max_position_embeddings is 77, expected 512"),
        ("text_config", {"hidden_size": "wide"}, r"config\.json: does not describe a BLIP .*hidden_size"),
        ("text_config", {"vocab_size": 60}, r"tokenizer .*: 52 words; expected the 60 of the model"),
        ("text_config", {"bos_token_id": 7}, r"tokenizer .*: \[DEC\] is token 50; in the model of .* 7"),
        ("text_config", {"sep_token_id": 102}, r"tokenizer .*: \[SEP\] is token 3; in the model of .* 102"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_named(
    captioner: Path, part: str, changes: dict[str, Any], named: str
) -> None:
    reconfigure(captioner, part, **changes)
    with pytest.raises(CheckpointError, match=named):
        load_med(captioner)


def test_a_transformers_folder_without_a_tokenizer_asks_for_one(captioner: Path, written: Path) -> None:
    for path in captioner.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json or vocab\.txt; expected one of them there, or"):
        load_med(captioner)
    assert load_med(captioner, tokenizer=written / "words").tokenizer.max_tokens == 20


def test_a_tokenizer_without_dec_of_the_model_s_size_has_two_words_too_many(captioner: Path) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(47))]
    (captioner / "tokenizer.json").unlink()
    (captioner / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (captioner / "vocab.txt").write_text("\n".join(vocabulary))
    named = r"54 words, with \[DEC\] and \[ENC\], which it lacked; expected the 52 of the model"
    with pytest.raises(CheckpointError, match=named):
        load_med(captioner)
    (captioner / "vocab.txt").write_text("\n".join(vocabulary[:-2]))
    # BERT's kind of tokenizer has no limit, or BERT's
    assert load_med(captioner).tokenizer.max_tokens == 35


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (BlipForQuestionAnswering, "a BlipForQuestionAnswering, which has no counterpart here"),
        (BlipModel, "a BlipModel, which has no counterpart here"),
    ],
)
def test_other_models_of_blip_are_refused(tmp_path: Path, model: Any, named: str) -> None:
    model(blip_config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        load_med(tmp_path)
    # the weights say it too
    reconfigure(tmp_path, architectures=None)
    with pytest.raises(CheckpointError, match=r"a VQA checkpoint|none of a BLIP"):
        load_med(tmp_path)


def test_another_model_s_folder_is_named_by_its_type(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    BertModel(config).save_pretrained(tmp_path)
    for read in (load_med, read_checkpoint_config):
        with pytest.raises(
            CheckpointError, match=r"config\.json: a model of type 'bert'; expected a checkpoint folder"
        ):
            read(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer .*: the folder has neither"):
        Tokenizer.load(tmp_path)


def test_an_empty_folder_and_one_without_weights_are_named(captioner: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: no config\.json; expected a folder with config\.json and"):
        load_med(tmp_path / "empty")
    (captioner / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights; expected model\.safetensors or pytorch_model\.bin"):
        load_med(captioner)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def test_truncated_weights_are_named(captioner: Path, written: Path, tmp_path: Path) -> None:
    truncated(captioner / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        load_med(captioner)
    (captioner / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(300)}, captioner / "pytorch_model.bin")
    truncated(captioner / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: torn, or not a torch file"):
        load_med(captioner)
    for legacy in (False, True):
        path = tmp_path / "torn.pth"
        saved = torch.load(written / "captioner.pth", weights_only=True)
        torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
        truncated(path)
        with pytest.raises(CheckpointError, match=r"torn\.pth: torn, or not a torch file"):
            load_med(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_torn_tokenizer_is_named(captioner: Path, name: str) -> None:
    whole = (captioner / name).read_text()
    for torn in (whole[:100], "", "[]", whole.replace('"single"', '"double"') if name == "tokenizer.json" else "{{"):
        (captioner / name).write_text(torn)
        with pytest.raises(CheckpointError, match=r"tokenizer .*captioner"):
            load_med(captioner)


def not_a_checkpoint(path: Path, case: str) -> None:
    if case == "text":
        path.write_text("a text\n")
    elif case == "JPEG":
        Image.new("RGB", (8, 8)).save(path, "JPEG")
    elif case == "nothing":
        path.touch()
    elif case == "tensor":
        torch.save(torch.zeros(3), path)
    elif case == "no weights":
        torch.save({"epoch": 3}, path)
    else:
        torch.save({"model": {"conv1.weight": torch.zeros(3)}}, path)


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("text", r"not a torch file \(it begins with b'a te'\)"),
        ("JPEG", r"not a torch file \(it begins with b'\\xff"),
        ("nothing", r"not a torch file \(it begins with nothing\)"),
        ("tensor", "holds no state dict, neither bare nor under 'model'"),
        ("no weights", "holds no state dict, neither bare nor under 'model'"),
        ("another model", r"1 weights, such as conv1\.weight, none of a BLIP; expected those below text_encoder\."),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, case: str, named: str) -> None:
    not_a_checkpoint(tmp_path / "file.pth", case)
    for read in (load_med, read_checkpoint_config):
        with pytest.raises(CheckpointError, match=rf"file\.pth: {named}"):
            read(tmp_path / "file.pth")


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["file.pth", "folder"])
def test_code_in_a_checkpoint_is_refused_and_not_run(captioner: Path, tmp_path: Path, place: str, legacy: bool) -> None:
    marker = tmp_path / "marker"
    (captioner / "model.safetensors").unlink()
    path = captioner / "pytorch_model.bin" if place == "folder" else tmp_path / "file.pth"
    weights = {"model": {"temp": torch.zeros(())}, "config": Malicious(marker)}
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    for read in (load_med, read_checkpoint_config):
        with pytest.raises(
            CheckpointError, match=r"holds pickled code \(\w+\.system\), which is not run; expected tensors"
        ):
            read(captioner if place == "folder" else path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_a_configuration_entry_of_another_class_is_refused_with_the_way_out(written: Path, tmp_path: Path) -> None:
    saved = torch.load(written / "captioner.pth", weights_only=True)
    torch.save({**saved, "config": argparse.Namespace(vit="base")}, tmp_path / "file.pth")
    with pytest.raises(
        CheckpointError, match=r"pickled code \(argparse\.Namespace\).*save \{\"model\": its state dict\}"
    ):
        load_med(tmp_path / "file.pth")
