"""The original release's files: every key and shape that its classes have, read and written.

Files are made of zeros that take no room: a tensor of the right shape over a single number.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_core.errors import CheckpointError, ConfigError
from blip_core.med.architecture import PRESETS, Architecture, Face
from blip_core.med.checkpoint import LoadedMED, load_med
from blip_core.med.convert import write_release
from blip_core.med.description import read_checkpoint_config
from blip_core.med.med import MED, build_med
from blip_core.med.release_names import RELEASE
from blip_core.med.tokenizer import Tokenizer

Shapes = dict[str, tuple[int, ...]]

FACES: dict[str, tuple[Face, ...]] = {
    "pretrain": ("encoder", "decoder"),
    "retrieval": ("encoder",),
    "itm": ("encoder",),
    "decoder": ("decoder",),
}
IMAGE_SIZES = {"pretrain": 224, "retrieval": 384, "itm": 384, "decoder": 384}
# as counted in fresh models of the official code
KEYS = {"pretrain": 1272, "retrieval": 949, "itm": 473, "decoder": 474}
QUEUES: dict[str, Shapes] = {
    "pretrain": {"image_queue": (256, 57600), "text_queue": (256, 57600), "queue_ptr": (1,)},
    "retrieval": {"image_queue": (256, 57600), "text_queue": (256, 57600), "idx_queue": (1, 57600), "ptr_queue": (1,)},
}
LISTS = Path(os.environ.get("CAPFILT_BLIP_KEYS", Path(__file__).parents[4] / "shared" / "blip_keys"))

SMALL = Architecture(32, 8, 64, 2, 1, 128, 2, 2, 16, 0.0, 0.1)
WORDS = ("a red circle", "a blue square", "two green rings", "a yellow star under a red cross")


def release_shapes(kind: str, architecture: Architecture, vocabulary: int = 30524) -> Shapes:
    """What a file of the release holds, derived from a MED of ours."""
    faces = FACES[kind]
    with torch.device("meta"):
        med = build_med(architecture, vocabulary, vocabulary - 1, vocabulary - 2, faces)
    ours = {name: tuple(tensor.shape) for name, tensor in med.state_dict().items()}
    pairs = RELEASE.pairs(faces, architecture.image_depth, architecture.text_depth)
    shapes = {theirs: ours[name] for name, theirs in pairs}
    shapes |= {f"{RELEASE.roots[face]}.embeddings.position_ids": (1, 512) for face in faces}
    if kind in QUEUES:
        modules = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
        for name, shape in list(shapes.items()):
            module, _, rest = name.partition(".")
            if module in modules:
                shapes[f"{module}_m.{rest}"] = shape
        shapes |= {"temp": (), **QUEUES[kind]}
    return shapes


def zeros(shapes: Shapes) -> dict[str, Tensor]:
    integers = ("position_ids", "queue_ptr", "ptr_queue", "idx_queue")
    return {
        name: torch.zeros((), dtype=torch.int64 if name.endswith(integers) else torch.float32).expand(shape)
        for name, shape in shapes.items()
    }


def listed(name: str) -> Shapes:
    """A list of the official keys, one of them a line: name, shape, kind of number."""
    path = LISTS / f"keys_{name}.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there (CAPFILT_BLIP_KEYS names the folder)")
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {key: tuple(int(size) for size in shape.strip("(),").split(",") if size) for key, shape, _ in lines}


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder with as many words as BERT's, and neither [DEC] nor [ENC]."""
    folder = tmp_path_factory.mktemp("bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *(f"word{number}" for number in range(30517))]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 512}')
    return folder


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    return Tokenizer.train(WORDS, vocabulary=100, max_tokens=20)


@pytest.fixture
def small(words: Tokenizer) -> LoadedMED:
    torch.manual_seed(0)
    med = build_med(SMALL, len(words), words.encode_id, words.decode_id).eval()
    return LoadedMED(med, words, "0" * 16, SMALL, {})


@pytest.fixture
def pretrained(small: LoadedMED, tmp_path: Path) -> dict[str, Tensor]:
    """A pre-trained model's state dict, with everything that only its training needs."""
    for kind in ("captioner", "filter"):
        write_release(tmp_path / f"{kind}.pth", small, kind)  # type: ignore[arg-type]
    halves = [torch.load(tmp_path / f"{kind}.pth", weights_only=True)["model"] for kind in ("captioner", "filter")]
    rest = zeros(release_shapes("pretrain", SMALL, len(small.tokenizer)))
    return {**rest, **halves[0], **halves[1], "temp": torch.tensor(0.05)}


def save(path: Path, weights: dict[str, Tensor], **rest: Any) -> Path:
    torch.save({"model": weights, **rest}, path)
    return path


@pytest.mark.parametrize("kind", FACES)
def test_the_names_are_those_of_the_official_classes(kind: str) -> None:
    shapes = release_shapes(kind, replace(PRESETS["base"], image_size=IMAGE_SIZES[kind]))
    assert len(shapes) == KEYS[kind]
    spots: Shapes = {
        "visual_encoder.pos_embed": (1, 197 if kind == "pretrain" else 577, 768),
        "visual_encoder.blocks.11.attn.qkv.weight": (2304, 768),
    }
    if "encoder" in FACES[kind]:
        spots |= {
            "text_encoder.embeddings.word_embeddings.weight": (30524, 768),
            "text_encoder.encoder.layer.11.crossattention.self.key.weight": (768, 768),
            "text_encoder.encoder.layer.0.attention.output.LayerNorm.bias": (768,),
            "vision_proj.weight": (256, 768),
            "itm_head.bias": (2,),
        }
    if "decoder" in FACES[kind]:
        spots |= {
            "text_decoder.bert.encoder.layer.3.intermediate.dense.weight": (3072, 768),
            "text_decoder.bert.embeddings.position_ids": (1, 512),
            "text_decoder.cls.predictions.bias": (30524,),
            "text_decoder.cls.predictions.decoder.bias": (30524,),
            "text_decoder.cls.predictions.decoder.weight": (30524, 768),
            "text_decoder.cls.predictions.transform.LayerNorm.weight": (768,),
        }
    if kind in QUEUES:
        spots |= {"text_encoder_m.encoder.layer.11.crossattention.self.value.bias": (768,), "temp": ()}
    assert {name: shapes[name] for name in spots} == spots


def test_the_names_of_the_large_captioner_are_as_many_as_the_official_class_has() -> None:
    shapes = release_shapes("decoder", replace(PRESETS["large"], image_size=384))
    assert len(shapes) == 618
    assert shapes["text_decoder.bert.encoder.layer.0.crossattention.self.key.weight"] == (768, 1024)


@pytest.mark.parametrize("kind", FACES)
def test_the_names_are_those_that_were_listed_from_the_official_code(kind: str) -> None:
    assert release_shapes(kind, replace(PRESETS["base"], image_size=IMAGE_SIZES[kind])) == listed(f"{kind}_base")


@pytest.mark.parametrize("kind", FACES)
def test_a_base_file_of_each_kind_is_read(kind: str, bert: Path, tmp_path: Path) -> None:
    base = replace(PRESETS["base"], image_size=IMAGE_SIZES[kind])
    path = save(tmp_path / "model.pth", zeros(release_shapes(kind, base)), config={"vit": "base", "queue_size": 57600})
    loaded = load_med(path, tokenizer=bert)
    assert loaded.architecture == base
    assert loaded.med.faces == FACES[kind]
    assert (loaded.tokenizer.decode_id, loaded.tokenizer.encode_id) == (30522, 30523)
    assert loaded.tokenizer.max_tokens == 35
    config = read_checkpoint_config(path)
    assert (config["digest"], config["faces"]) == (loaded.digest, list(FACES[kind]))


def test_a_large_file_has_the_heads_and_the_stochastic_depth_of_the_official_code(bert: Path, tmp_path: Path) -> None:
    shallow = replace(PRESETS["large"], image_size=384, image_depth=1, text_depth=1)
    path = save(tmp_path / "large.pth", zeros(release_shapes("itm", shallow)))
    assert load_med(path, tokenizer=bert).architecture == shallow
    assert (shallow.image_heads, shallow.text_heads, shallow.drop_path) == (16, 12, 0.1)


def test_every_weight_of_a_pretrained_file_comes_to_its_place(
    pretrained: dict[str, Tensor], small: LoadedMED, words: Tokenizer, tmp_path: Path
) -> None:
    words.save(tmp_path / "words")
    loaded = load_med(save(tmp_path / "model.pth", pretrained), tokenizer=tmp_path / "words")
    own, read = small.med.state_dict(), loaded.med.state_dict()
    assert read.keys() == own.keys()
    assert [name for name in own if name != "temperature" and not torch.equal(own[name], read[name])] == []
    assert read["temperature"].tolist() == pytest.approx([0.05])
    vit = {name: tensor for name, tensor in pretrained.items() if name.startswith("visual_encoder.")}
    assert vit.keys() == {f"visual_encoder.{name}" for name in small.med.image_encoder.vit.state_dict()}
    layer = loaded.med.text.layers[1]
    for theirs, ours in {
        "text_encoder.encoder.layer.1.attention.self.query.weight": layer.self_attention["encoder"].query.weight,
        "text_decoder.bert.encoder.layer.1.attention.self.query.weight": layer.self_attention["decoder"].query.weight,
        "text_encoder.encoder.layer.1.crossattention.output.dense.bias": layer.cross_attention.output.bias,
        "text_decoder.bert.encoder.layer.1.output.dense.weight": layer.feed_forward.contract.weight,
    }.items():
        assert torch.equal(pretrained[theirs], ours)


def test_a_file_of_one_face_has_the_exact_keys_of_its_class_and_the_copies_take_no_room(
    small: LoadedMED, tmp_path: Path
) -> None:
    for kind, face in (("decoder", "captioner"), ("itm", "filter")):
        write_release(tmp_path / f"{kind}.pth", small, face)  # type: ignore[arg-type]
        saved = torch.load(tmp_path / f"{kind}.pth", weights_only=True)
        assert saved.keys() == {"model"}
        found = {name: tuple(tensor.shape) for name, tensor in saved["model"].items()}
        assert found == release_shapes(kind, SMALL, len(small.tokenizer))
        assert saved["model"][f"{RELEASE.roots[FACES[kind][0]]}.embeddings.position_ids"].tolist() == [[*range(512)]]
    captioner = torch.load(tmp_path / "decoder.pth", weights_only=True)["model"]
    words, copy = (
        captioner[f"text_decoder.{name}.weight"]
        for name in ("bert.embeddings.word_embeddings", "cls.predictions.decoder")
    )
    assert words.untyped_storage().data_ptr() == copy.untyped_storage().data_ptr()


def test_other_heads_than_the_release_s_cannot_be_written(med: MED, tokenizer: Tokenizer, tmp_path: Path) -> None:
    narrow = LoadedMED(med, tokenizer, "", Architecture(16, 8, 32, 1, 2, 32, 2, 2, 16, 0.0, 0.0), {})
    with pytest.raises(CheckpointError, match=r"image encoder has 2 heads at a width of 32.*one for each 64"):
        write_release(tmp_path / "narrow.pth", narrow, "filter")
    assert not list(tmp_path.iterdir())


def test_positions_are_interpolated_as_the_official_code_does(
    pretrained: dict[str, Tensor], words: Tokenizer, tmp_path: Path
) -> None:
    words.save(tmp_path / "words")
    path = save(tmp_path / "model.pth", pretrained)
    loaded = load_med(path, image_size=48, tokenizer=tmp_path / "words")
    old = pretrained["visual_encoder.pos_embed"]
    grid = old[:, 1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    positions = loaded.med.state_dict()["image_encoder.vit.pos_embed"]
    assert torch.equal(positions[:, :1], old[:, :1])
    assert torch.allclose(positions[:, 1:], wanted, atol=1e-6)
    assert (loaded.architecture.image_size, loaded.med.image_size) == (48, 48)
    assert loaded.med.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 37, 64)
    with pytest.raises(ConfigError, match="image size 50: must be a multiple of the patch size 8"):
        load_med(path, image_size=50, tokenizer=tmp_path / "words")


def test_an_untied_checkpoint_is_refused(pretrained: dict[str, Tensor], tmp_path: Path) -> None:
    name = "text_decoder.bert.encoder.layer.1.output.dense.weight"
    path = save(tmp_path / "model.pth", {**pretrained, name: pretrained[name] + 1})
    with pytest.raises(CheckpointError, match=rf"model\.pth: text_encoder\..* and {name} differ; .*untied"):
        load_med(path)


def test_vqa_and_nlvr2_checkpoints_are_refused_with_a_sentence(pretrained: dict[str, Tensor], tmp_path: Path) -> None:
    heads = ("vision_proj", "text_proj", "itm_head", "temp", "image_queue", "text_queue", "queue_ptr")
    vqa = {name: tensor for name, tensor in pretrained.items() if not name.startswith(heads) and "_m." not in name}
    with pytest.raises(CheckpointError, match=r"vqa\.pth: a VQA checkpoint.*not supported"):
        load_med(save(tmp_path / "vqa.pth", vqa))
    encoder = {name: tensor for name, tensor in vqa.items() if not name.startswith("text_decoder")}
    with pytest.raises(CheckpointError, match=r"nlvr\.pth: an NLVR2 checkpoint.*not supported"):
        load_med(save(tmp_path / "nlvr.pth", {**encoder, "cls_head.0.bias": torch.zeros(3)}))


@pytest.mark.parametrize(("name", "kind"), [("vqa", "VQA"), ("nlvr", "NLVR2")])
def test_so_are_those_of_the_official_sizes(name: str, kind: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model.pth", zeros(listed(f"{name}_base")))
    with pytest.raises(CheckpointError, match=rf"an? {kind} checkpoint.*not supported"):
        load_med(path)


def test_a_feature_extractor_lacks_the_heads(pretrained: dict[str, Tensor], tmp_path: Path) -> None:
    features = {
        name: tensor for name, tensor in pretrained.items() if name.startswith(("visual_encoder.", "text_encoder."))
    }
    with pytest.raises(CheckpointError, match=r"6 weights are missing, the first is vision_proj\.weight"):
        load_med(save(tmp_path / "features.pth", features))
