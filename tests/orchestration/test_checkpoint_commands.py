"""`capfilt convert` and `capfilt score`: the same model in every format, and one line for what is wrong."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from blip_core.capfilt.filter import Filter
from blip_core.data.transforms import eval_transform
from blip_core.med.architecture import Architecture
from blip_core.med.checkpoint import load_med, save_med
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer

Capfilt = Callable[..., tuple[int, str, str]]

# one head for each 64 of the width, so that the release's format can hold it
ARCHITECTURE = Architecture(16, 8, 64, 1, 1, 64, 1, 1, 16, 0.0, 0.0)
TEXTS = ("a red circle", "[two] green rings")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `med`, which has both faces, and a picture."""
    folder = tmp_path_factory.mktemp("models")
    words = Tokenizer.train(["a red circle", "a blue square", "two green rings"], vocabulary=100, max_tokens=20)
    torch.manual_seed(0)
    med = build_med(ARCHITECTURE, len(words), words.encode_id, words.decode_id)
    with torch.no_grad():
        for parameter in med.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        med.temperature.fill_(0.07)
    save_med(folder / "med", med, ARCHITECTURE, words, {})
    Image.effect_noise((50, 30), 90).convert("RGB").save(folder / "picture.png")
    return folder


def scores(capfilt: Capfilt, models: Path, source: Path, *options: str) -> list[dict[str, float]]:
    arguments = [str(models / "picture.png"), *TEXTS, "--filter", str(source), "--json", *options]
    status, out, _ = capfilt("score", *arguments)
    assert status == 0
    return json.loads(out)


def test_a_filter_gives_the_same_scores_in_every_format(capfilt: Capfilt, models: Path, tmp_path: Path) -> None:
    med, folder, file, own = models / "med", tmp_path / "folder", tmp_path / "file.pth", tmp_path / "own"
    words = ("--tokenizer", str(med))
    for arguments, done in (
        ((med, folder, "--to", "transformers", "--kind", "filter"), "transformers' BlipForImageTextRetrieval"),
        ((folder, file, "--to", "release"), "a filter of the original release"),
        ((file, own, "--to", "capfilt", *words), "a checkpoint of this project (text encoder)"),
    ):
        status, out, err = capfilt("convert", *map(str, arguments))
        assert (status, err, out.count("\n")) == (0, "", 1)
        assert f"wrote {arguments[1]}: {done}" in out
    found = scores(capfilt, models, med)
    assert [row["text"] for row in found] == list(TEXTS)
    for source, options in ((folder, ()), (file, words), (own, ())):
        assert scores(capfilt, models, source, *options) == found


def test_scores_with_cls_are_those_of_transformers_and_those_with_enc_are_not(
    capfilt: Capfilt, models: Path, tmp_path: Path
) -> None:
    status, _, _ = capfilt(
        "convert", str(models / "med"), str(tmp_path / "f"), "--to", "transformers", "--kind", "filter"
    )
    assert status == 0
    theirs = BlipForImageTextRetrieval.from_pretrained(tmp_path / "f").eval()
    ids, mask = load_med(models / "med").tokenizer(TEXTS)
    pixels = eval_transform(16)(Image.open(models / "picture.png"))[None].expand(2, -1, -1, -1)
    with torch.inference_mode():
        itm = theirs(ids, pixels, attention_mask=mask.long()).itm_score.softmax(dim=1)[:, 1]
        itc = theirs(ids, pixels, attention_mask=mask.long(), use_itm_head=False).itm_score[0]
    found = scores(capfilt, models, models / "med", "--open-with", "cls")
    assert [row["itm_score"] for row in found] == pytest.approx(itm.tolist(), abs=1e-4)
    assert [row["itc_score"] for row in found] == pytest.approx(itc.tolist(), abs=1e-4)
    enc = scores(capfilt, models, models / "med")
    assert [row["itm_score"] for row in enc] != pytest.approx(itm.tolist(), abs=1e-3)
    assert [row["itc_score"] for row in enc] == pytest.approx(itc.tolist(), abs=1e-4)


def test_scores_are_shown_as_a_table_and_at_another_image_size(capfilt: Capfilt, models: Path) -> None:
    arguments = ("score", str(models / "picture.png"), *TEXTS, "--filter", str(models / "med"))
    status, out, _ = capfilt(*arguments)
    assert status == 0
    assert all(text in out for text in (*TEXTS, "itm_score", "itc_score"))
    status, other, _ = capfilt(*arguments, "--image-size", "32")
    assert status == 0
    assert other != out


def test_a_captioner_is_written_for_transformers_at_the_size_that_was_asked_for(
    capfilt: Capfilt, models: Path, tmp_path: Path
) -> None:
    status, out, _ = capfilt(
        "convert", str(models / "med"), str(tmp_path / "c"), "--to", "transformers", "--kind", "captioner",
        "--image-size", "24",
    )  # fmt: skip
    assert status == 0
    assert "for images of 24 x 24" in out
    model = BlipForConditionalGeneration.from_pretrained(tmp_path / "c").eval()
    assert model.generate(torch.zeros(1, 3, 24, 24), max_length=4).shape[0] == 1


@pytest.mark.parametrize(
    ("arguments", "named", "expected"),
    [
        (("{med}", "{new}", "--to", "transformers"), "say which, --kind captioner or --kind filter", 2),
        (("{med}", "{new}", "--to", "release"), "say which, --kind captioner or --kind filter", 2),
        (("{med}", "{new}", "--to", "capfilt", "--kind", "filter"), "--kind", 2),
        (("{med}", "{med}", "--to", "capfilt"), "exists already", 2),
        (("{med}", "{new}", "--to", "capfilt", "--image-size", "20"), "image size 20", 2),
        (("{picture}", "{new}", "--to", "capfilt"), "picture.png: not a torch file", 1),
        (("{new}", "{new}", "--to", "capfilt"), "new: not found", 1),
    ],
)
def test_what_cannot_be_converted_gets_one_line_and_nothing_is_written(
    capfilt: Capfilt, models: Path, tmp_path: Path, arguments: tuple[str, ...], named: str, expected: int
) -> None:
    places = {"med": models / "med", "picture": models / "picture.png", "new": tmp_path / "new"}
    status, out, err = capfilt("convert", *(argument.format(**places) for argument in arguments))
    assert (status, out, err.count("\n")) == (expected, "", 1)
    assert named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named", "expected"),
    [
        (("{picture}", "a", " . ", "--filter", "{med}"), "text ' . ': holds no word", 2),
        (("{picture}", "a", "--filter", "{med}", "--image-size", "20"), "image size 20", 2),
        (("{picture}", "a", "--filter", "{nowhere}"), "nowhere: not found", 1),
        (("{picture}", "a", "--filter", "{captioner}"), "has no text encoder", 1),
        (("{picture}", "a", "--filter", "{picture}"), "picture.png: not a torch file", 1),
        (("{nowhere}", "a", "--filter", "{med}"), "image {nowhere}: cannot be read", 1),
        (("{med}", "a", "--filter", "{med}"), "image {med}: cannot be read", 1),
        (("{config}", "a", "--filter", "{med}"), "image {config}: the image cannot be used: not_an_image", 1),
    ],
)
def test_what_cannot_be_scored_gets_one_line(
    capfilt: Capfilt, models: Path, tmp_path: Path, arguments: tuple[str, ...], named: str, expected: int
) -> None:
    places = {
        "med": models / "med",
        "picture": models / "picture.png",
        "config": models / "med" / "config.json",
        "nowhere": tmp_path / "nowhere",
        "captioner": tmp_path / "captioner",
    }
    if "{captioner}" in arguments:
        source, target = str(places["med"]), str(places["captioner"])
        capfilt("convert", source, target, "--to", "transformers", "--kind", "captioner")
    status, out, err = capfilt("score", *(argument.format(**places) for argument in arguments))
    assert (status, out, err.count("\n")) == (expected, "", 1)
    assert named.format(**places) in err


def snippet(folder: Path, language: str) -> str:
    """The first block of a language in the card of a folder."""
    text = ModelCard.load(folder / "README.md").text
    return text.split(f"```{language}\n", 1)[1].split("```", 1)[0]


@pytest.mark.parametrize("kind", ["captioner", "filter"])
def test_what_is_written_for_transformers_has_a_card_whose_program_runs(
    kind: str, capfilt: Capfilt, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / kind
    assert capfilt("convert", str(models / "med"), str(folder), "--to", "transformers", "--kind", kind)[0] == 0
    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.license) == ("transformers", "other")
    picture = Image.open(models / "picture.png")
    picture.save(folder / "picture.jpg", quality=100, subsampling=0)
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(snippet(folder, "python"), found)
    if kind == "captioner":
        assert isinstance(found["caption"], str)
        assert found["tokens"].shape[0] == 1
        return
    judge = Filter.load(models / "med")
    own = eval_transform(16)(Image.open("picture.jpg").convert("RGB"))[None]
    # transformers shrinks pictures by another program, which rounds in other places
    for pixels, near in ((found["inputs"]["pixel_values"][:1], 1e-4), (own, 0.01)):
        (scores,) = judge.score(pixels, [found["texts"]])
        assert found["match"].tolist() == pytest.approx([score.itm for score in scores], abs=near)


@pytest.mark.parametrize(("to", "kind"), [("capfilt", None), ("transformers", "captioner"), ("transformers", "filter")])
def test_the_commands_of_a_card_run_in_its_folder(
    to: str, kind: str | None, capfilt: Capfilt, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    options = ("--kind", kind) if kind else ()
    assert capfilt("convert", str(models / "med"), str(folder), "--to", to, *options)[0] == 0
    assert ModelCard.load(folder / "README.md").data.library_name == to
    Image.open(models / "picture.png").save(folder / "picture.jpg")
    monkeypatch.chdir(folder)
    commands = [shlex.split(line) for line in snippet(folder, "bash").splitlines()]
    assert [words[1] for words in commands] == {"captioner": ["caption"], "filter": ["score"]}.get(
        kind or "", ["caption", "score"]
    )
    for _, *words in commands:
        assert capfilt(*words)[0] == 0


def test_a_release_file_stands_alone(capfilt: Capfilt, models: Path, tmp_path: Path) -> None:
    arguments = ("--to", "release", "--kind", "filter")
    assert capfilt("convert", str(models / "med"), str(tmp_path / "f.pth"), *arguments)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["f.pth"]
