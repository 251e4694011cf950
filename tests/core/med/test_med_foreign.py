"""Checkpoints of others: every way in which transformers leaves one, and every way in which one can be wrong."""

import argparse
import json
import os
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
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipModel,
)

from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.data.transforms import eval_transform
from blip_core.errors import CheckpointError, ConfigError
from blip_core.med import foreign
from blip_core.med.checkpoint import LoadedMED, load_med, read_checkpoint_config, save_med
from blip_core.med.convert import Kind, write_release, write_transformers
from blip_core.med.generation import GenerationConfig, generate
from blip_core.med.med import MED, Architecture, build_med
from blip_core.med.tokenizer import Tokenizer

# heads of the release's width
ARCHITECTURE = Architecture(16, 8, 64, 2, 1, 64, 2, 1, 16, 0.0, 0.1)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def full(tokenizer: Tokenizer) -> LoadedMED:
    torch.manual_seed(0)
    med = build_med(ARCHITECTURE, len(tokenizer), tokenizer.encode_id, tokenizer.decode_id)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        med.temperature.fill_(0.07)
    return LoadedMED(med.eval(), tokenizer, "0" * 16, ARCHITECTURE, {})


@pytest.fixture(scope="module")
def written(full: LoadedMED, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captioner, filter (transformers'), captioner.pth, filter.pth (the release's) and words."""
    folder = tmp_path_factory.mktemp("written")
    kinds: tuple[Kind, ...] = ("captioner", "filter")
    for kind in kinds:
        write_transformers(folder / kind, full, kind)
        write_release(folder / f"{kind}.pth", full, kind)
    full.tokenizer.save(folder / "words")
    return folder


@pytest.fixture
def captioner(written: Path, tmp_path: Path) -> Path:
    """A captioner's folder of transformers', to be spoilt."""
    return Path(shutil.copytree(written / "captioner", tmp_path / "captioner"))


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


def blip_config(**vision: Any) -> BlipConfig:
    text = {"vocab_size": 52, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1}
    image = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 2}
    return BlipConfig(text_config=text | heads, vision_config=image | heads | vision)


# What comes in


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_a_model_of_one_face_is_read_written_and_read_again(
    written: Path, full: LoadedMED, kind: str, tmp_path: Path
) -> None:
    face = {"captioner": "decoder", "filter": "encoder"}[kind]
    for source in (written / kind, written / f"{kind}.pth"):
        loaded = load_med(source, tokenizer=written / "words")
        assert loaded.med.faces == (face,)
        assert same(loaded.med, full.med)
        digest = save_med(tmp_path / "own", loaded.med, loaded.architecture, loaded.tokenizer, {"start": loaded.digest})
        again = load_med(tmp_path / "own")
        assert (again.digest, again.med.faces, again.config["faces"]) == (digest, (face,), [face])
        assert same(again.med, full.med)


def test_a_transformers_model_brings_sizes_tokenizer_and_a_digest_of_its_weights(
    written: Path, full: LoadedMED
) -> None:
    loaded = load_med(written / "filter")
    assert loaded.architecture == ARCHITECTURE
    assert loaded.tokenizer.pieces.get_vocab() == full.tokenizer.pieces.get_vocab()
    assert loaded.tokenizer.max_tokens == 20
    assert loaded.med.temperature.tolist() == pytest.approx([0.07])
    config = read_checkpoint_config(written / "filter")
    assert config == loaded.config
    assert (config["digest"], config["format"]) == (loaded.digest, "transformers' BlipForImageTextRetrieval")
    assert loaded.digest != load_med(written / "captioner").digest


def test_weights_in_several_files_or_in_a_torch_file_are_the_same_model(
    written: Path, full: LoadedMED, tmp_path: Path
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
        assert same(load_med(folder).med, full.med)
    next(iter(sharded.glob("model-00001-*"))).unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: 1 of its \d+ files are missing, such as model-00001"):
        load_med(sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json: not an index of weights"):
        load_med(sharded)


def test_half_precision_is_widened(captioner: Path) -> None:
    rewrite(captioner, lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    assert {tensor.dtype for tensor in load_med(captioner).med.state_dict().values()} == {torch.float32}


def test_what_older_versions_saved_besides_is_known(captioner: Path, full: LoadedMED) -> None:
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
    assert same(load_med(captioner).med, full.med)


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
def test_their_processor_and_model_write_the_captions_that_ours_writes(written: Path, full: LoadedMED) -> None:
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
    image = full.med.cross_keys(full.med.encode_image(pixels))
    ((ours, _),) = generate(full.med, full.tokenizer, image, GenerationConfig("greedy", max_length=8, min_length=2))
    assert theirs.strip() == ours
    batch = processor(picture, "a red circle", return_tensors="pt")
    assert torch.equal(batch.input_ids, full.tokenizer(["a red circle"]).ids)


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


# The hub


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

    monkeypatch.setattr(foreign, "snapshot_download", fetch)
    assert Captioner.load("someone/blip-captioner").digest == load_med(written / "captioner").digest
    # the torch file is asked for where there is no safetensors file
    assert wanted == [
        ["model.safetensors", "config.json", "vocab.txt"],
        ["pytorch_model.bin", "config.json", "vocab.txt"],
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


# What is wrong with a folder or file


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
        ("vision_config", {"num_hidden_layers": 3}, r"are missing, the first is vision_model\.encoder\.layers\.2\."),
        ("text_config", {"num_hidden_layers": 1}, r"are unknown, the first is text_decoder\.bert\.encoder\.layer\.1\."),
        ("vision_config", {"image_size": 24}, r"position_embedding has shape \(1, 5, 64\); expected \(1, 10, 64\)"),
        ("vision_config", {"image_size": [16, 16]}, r"image_size is \[16, 16\], expected a multiple of its patch_size 8"),
        ("vision_config", {"patch_size": 5}, r"image_size is 16, expected a multiple of its patch_size 5"),
        ("text_config", {"num_attention_heads": 5}, r"text_config\.hidden_size is 64, expected a multiple of its num_atten"),
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


# Code in a checkpoint


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
