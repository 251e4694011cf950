"""`capfilt caption`: captions of pictures, decoded as the options say; one line for what is wrong."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, BlipForConditionalGeneration

from blip_core.data.transforms import eval_transform

Capfilt = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twenty pictures, more than are captioned at once; the first is there twice."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{number}.png" for number in range(20)]
    for number, path in enumerate(paths):
        Image.effect_noise((40 + number, 30), 10 + 10 * number).convert("RGB").save(path)
    paths[-1].write_bytes(paths[0].read_bytes())
    return paths


def captions(capfilt: Capfilt, pictures: list[Path], published: Path, *options: str) -> list[dict[str, Any]]:
    arguments = ["caption", *map(str, pictures), "--captioner", str(published / "captioner"), "--json", *options]
    status, out, err = capfilt(*arguments)
    assert status == 0, err
    return json.loads(out)


def test_greedy_captions_are_those_of_transformers(capfilt: Capfilt, pictures: list[Path], published: Path) -> None:
    found = captions(capfilt, pictures[:3], published, "--method", "greedy", "--max-length", "8", "--min-length", "2")
    model = BlipForConditionalGeneration.from_pretrained(published / "captioner").eval()
    words = AutoTokenizer.from_pretrained(published / "captioner")
    pixels = torch.stack([eval_transform(32)(Image.open(path)) for path in pictures[:3]])
    # their lengths count [DEC]
    theirs = model.generate(pixels, num_beams=1, do_sample=False, max_length=9, min_length=3)
    assert [row["caption"] for row in found] == [words.decode(ids, skip_special_tokens=True).strip() for ids in theirs]
    assert [row["image"] for row in found] == [str(path) for path in pictures[:3]]


def test_a_pictures_captions_depend_on_its_bytes_the_seed_and_the_number_alone(
    capfilt: Capfilt, pictures: list[Path], published: Path
) -> None:
    every = captions(capfilt, pictures, published, "--candidates", "2", "--seed", "7")
    assert [row["candidate"] for row in every] == [1, 2] * len(pictures)
    alone = captions(capfilt, [pictures[5]], published, "--candidates", "2", "--seed", "7")
    assert [row["caption"] for row in alone] == [row["caption"] for row in every[10:12]]
    assert [row["caption"] for row in every[-2:]] == [row["caption"] for row in every[:2]]
    other = captions(capfilt, pictures, published, "--candidates", "2", "--seed", "8")
    assert [row["caption"] for row in other] != [row["caption"] for row in every]


@pytest.mark.parametrize(
    "options",
    [
        ("--p", "0.05"),
        ("--top-k", "1"),
        ("--temperature", "0.05"),
        ("--method", "beam", "--beams", "4"),
        ("--max-length", "3", "--min-length", "1"),
        ("--repetition-penalty", "5"),
        ("--prompt", "a picture of"),
    ],
)
def test_every_option_of_decoding_has_its_effect(
    options: tuple[str, ...], capfilt: Capfilt, pictures: list[Path], published: Path
) -> None:
    plain = captions(capfilt, pictures[:4], published)
    changed = captions(capfilt, pictures[:4], published, *options)
    assert [row["caption"] for row in changed] != [row["caption"] for row in plain]


def test_a_filter_scores_the_captions_as_the_command_for_it_does(
    capfilt: Capfilt, pictures: list[Path], published: Path
) -> None:
    judge = str(published / "filter")
    (row,) = captions(capfilt, [pictures[3]], published, "--filter", judge)
    status, out, _ = capfilt("score", str(pictures[3]), row["caption"], "--filter", judge, "--json")
    assert status == 0
    (scored,) = json.loads(out)
    assert scored == pytest.approx(
        {"text": row["caption"], "itm_score": row["itm_score"], "itc_score": row["itc_score"]}
    )


def test_captions_are_shown_as_a_table(capfilt: Capfilt, pictures: list[Path], published: Path) -> None:
    status, out, err = capfilt("caption", str(pictures[0]), "--captioner", str(published / "captioner"))
    assert (status, err) == (0, "")
    assert all(name in out for name in ("image", "candidate", "caption", "logprob"))


@pytest.mark.parametrize(
    ("arguments", "named", "expected"),
    [
        (("{picture}", "--captioner", "{filter}"), "has no text decoder", 1),
        (("{picture}", "--captioner", "{captioner}", "--filter", "{captioner}"), "has no text encoder", 1),
        (("{picture}", "{nowhere}", "--captioner", "{captioner}"), "image {nowhere}: cannot be read", 1),
        (("{config}", "--captioner", "{captioner}"), "image {config}: the image cannot be used: not_an_image", 1),
        (("{picture}", "--captioner", "{nowhere}"), "nowhere: not found", 1),
        (("{picture}", "--captioner", "{captioner}", "--p", "0"), "p: ", 2),
        (("{picture}", "--captioner", "{captioner}", "--max-length", "501"), "max_length: ", 2),
    ],
)
def test_what_cannot_be_captioned_gets_one_line(
    pictures: list[Path], published: Path, tmp_path: Path, arguments: tuple[str, ...], named: str, expected: int
) -> None:
    places = {"picture": pictures[0], "nowhere": tmp_path / "nowhere", "config": published / "filter" / "config.json"}
    places |= {"captioner": published / "captioner", "filter": published / "filter"}
    # A process of its own: what other tests left behind in this one has been seen to add a line.
    command = [sys.executable, "-m", "flows", "caption", *(argument.format(**places) for argument in arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (expected, "")
    assert [named.format(**places) in line for line in answer.stderr.splitlines()] == [True], answer.stderr
