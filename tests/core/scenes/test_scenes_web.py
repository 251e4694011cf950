"""The synthetic web: its kinds, its faults, its truth, and that the seed decides every byte."""

import hashlib
import io
import json
import urllib.request
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.errors import ConfigError, WorkspaceError
from blip_core.scenes import grammar
from blip_core.scenes.grammar import is_right, read_caption
from blip_core.scenes.server import serve_scenes
from blip_core.scenes.web import ScenesConfig, ScenesPaths, make_scenes, url_table

SMALL = ScenesConfig(
    web_images=200,
    human_pairs=40,
    held_out=120,
    mismatched=0.35,
    junk=0.2,
    dead_links=3,
    non_images=2,
    truncated=4,
    oversized=1,
    duplicates=6,
    seed=5,
)
FAULTS = 3 + 2 + 4 + 1


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> ScenesPaths:
    return make_scenes(tmp_path_factory.mktemp("made") / "web", SMALL)


def _rows(paths: ScenesPaths) -> list[dict]:
    """The web pairs with their truth."""
    truths = {truth["uid"]: truth for truth in pq.read_table(paths.truth).to_pylist()}
    rows = [{**row, **truths[row["uid"]]} for row in pq.read_table(paths.rows).to_pylist()]
    assert len(truths) == len(rows)
    return [{**row, "scene": row["scene"] and json.loads(row["scene"])} for row in rows]


def _contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_web_pairs_have_the_shares_that_were_asked_for(paths: ScenesPaths) -> None:
    kinds = Counter(row["kind"] for row in _rows(paths)[:200])
    assert kinds == {"right": 90, "mismatched": 70, "junk": 40}


def test_the_truth_of_a_text_is_what_its_kind_says(paths: ScenesPaths) -> None:
    for row in _rows(paths):
        if row["scene"] is not None:
            assert is_right(row["alt"], row["scene"]) == (row["kind"] == "right"), row


def test_mismatched_texts_are_captions_and_junk_is_not(paths: ScenesPaths) -> None:
    rows = _rows(paths)
    scenes = [row["scene"] for row in rows if row["scene"]]
    shown = [row for row in rows if row["scene"]]
    assert all(any(is_right(r["alt"], scene) for scene in scenes) for r in shown if r["kind"] == "mismatched")
    assert not any(is_right(r["alt"], scene) for r in rows if r["kind"] == "junk" for scene in scenes)


def test_some_junk_uses_the_words_of_the_grammar(tmp_path: Path) -> None:
    made = make_scenes(tmp_path / "web", ScenesConfig(web_images=100, human_pairs=1, held_out=1, junk=1, mismatched=0))
    texts = {row["alt"] for row in _rows(made)}
    assert any("clipart" in text for text in texts)
    assert len(texts) > 60


def test_faulty_rows_show_no_picture_and_the_others_do(paths: ScenesPaths) -> None:
    rows = _rows(paths)
    assert len(rows) == 200 + FAULTS + 6
    dead, pages, cut, huge = rows[200:203], rows[203:205], rows[205:209], rows[209:210]
    assert all(row["scene"] is None and row["kind"] != "right" for row in rows[200 : 200 + FAULTS])
    assert not any((paths.folder / row["path"]).exists() for row in dead)
    for row in pages:
        assert (paths.folder / row["path"]).read_bytes().startswith(b"<!DOCTYPE html>")
        assert row["path"].endswith(".jpg")
    for row in cut:
        with pytest.raises(OSError, match="truncated"), Image.open(paths.folder / row["path"]) as picture:
            picture.load()
    for row in huge:
        # Only the size is read: decoding it is what a downloader must not do.
        header = (paths.folder / row["path"]).read_bytes()[:33]
        assert int.from_bytes(header[16:20]) * int.from_bytes(header[20:24]) == 81_000_000
        assert (paths.folder / row["path"]).stat().st_size < 100_000
    for row in rows[:200] + rows[210:]:
        with Image.open(paths.folder / row["path"]) as picture:
            assert picture.size == (64, 64)
            picture.load()


def test_duplicates_repeat_a_url_or_a_picture_under_their_own_uids(paths: ScenesPaths) -> None:
    rows = _rows(paths)
    assert len({row["uid"] for row in rows}) == len(rows)
    originals, duplicates = rows[:200], rows[210:]
    same_url = [row for row in duplicates if any(row["path"] == other["path"] for other in originals)]
    elsewhere = [row for row in duplicates if row not in same_url]
    assert len(same_url) == len(elsewhere) == 3
    by_bytes = {(paths.folder / row["path"]).read_bytes(): row for row in originals}
    for row in duplicates:
        original = by_bytes[(paths.folder / row["path"]).read_bytes()]
        assert (row["alt"], row["scene"], row["kind"]) == (original["alt"], original["scene"], original["kind"])


def test_held_out_pairs_can_be_told_apart_by_every_caption(paths: ScenesPaths) -> None:
    pairs = pq.read_table(paths.held_out).to_pylist()
    assert len(pairs) == len({pair["uid"] for pair in pairs}) == 120
    captions = [caption for pair in pairs for caption in pair["caption"]]
    assert len(set(captions)) == len(captions)
    assert {len(pair["caption"]) for pair in pairs} == {2, 3}
    scenes = [{read_caption(caption) for caption in pair["caption"]} for pair in pairs]
    assert all(len(told) == 1 and None not in told for told in scenes)
    assert len(set.union(*scenes)) == len(pairs)


def test_human_pairs_are_pictures_with_two_or_three_captions(paths: ScenesPaths) -> None:
    pairs = pq.read_table(paths.human).to_pylist()
    assert len({pair["uid"] for pair in pairs}) == 40
    for pair in pairs:
        assert Image.open(io.BytesIO(pair["image"])).size == (64, 64)
        assert len(set(pair["caption"])) in (2, 3)
        (told,) = {read_caption(caption) for caption in pair["caption"]}
        assert told is not None


def test_no_picture_is_in_two_sets(paths: ScenesPaths) -> None:
    sets = [{pair["image"] for pair in pq.read_table(table).to_pylist()} for table in (paths.human, paths.held_out)]
    web = {path.read_bytes() for path in (paths.folder / "images").iterdir()}
    assert len(sets[0] | sets[1] | web) == len(sets[0]) + len(sets[1]) + len(web)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(paths: ScenesPaths, tmp_path: Path) -> None:
    again = make_scenes(tmp_path / "again", SMALL)
    assert _contents(again.folder) == _contents(paths.folder)
    few = {"web_images": 5, "human_pairs": 2, "held_out": 2, "oversized": 0}
    one = make_scenes(tmp_path / "one", ScenesConfig(**few, seed=1))
    two = make_scenes(tmp_path / "two", ScenesConfig(**few, seed=2))
    assert set(_contents(one.folder)) & set(_contents(two.folder)) == {
        "scenes.json",
        "rows.parquet",
        "truth.parquet",
        "human.parquet",
        "held_out.parquet",
    }


def test_scenes_that_stand_are_left_alone_and_others_are_replaced(tmp_path: Path) -> None:
    config = ScenesConfig(web_images=5, human_pairs=2, held_out=2, oversized=0)
    made = make_scenes(tmp_path / "web", config)
    (made.folder / "mark").touch()
    make_scenes(tmp_path / "web", config)
    assert (made.folder / "mark").exists()
    make_scenes(tmp_path / "web", ScenesConfig(web_images=6, human_pairs=2, held_out=2, oversized=0))
    assert not (made.folder / "mark").exists()
    assert pq.read_table(made.human).num_rows == 2


def test_a_folder_of_other_things_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(WorkspaceError, match="something other than scenes"):
        make_scenes(tmp_path, SMALL)
    assert (tmp_path / "letters.txt").read_text() == "mine"


def test_shares_above_one_and_worlds_too_small_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"mismatched \+ junk: 1\.2"):
        ScenesConfig(mismatched=0.7, junk=0.5)
    with pytest.raises(ConfigError, match="web_images: 1 pictures"):
        make_scenes(tmp_path / "web", ScenesConfig(web_images=1, mismatched=1.0, junk=0.0))
    for name in ("SHAPES", "COLOURS", "BACKGROUNDS", "FRAMES"):  # one of each: what is left are the sizes
        monkeypatch.setattr(grammar, name, tuple(getattr(grammar, name))[:1])
    scenes = len(grammar.SIZES)
    few = {"web_images": 1, "mismatched": 0.0, "junk": 0.0, "human_pairs": 1, "oversized": 0}
    with pytest.raises(ConfigError, match=f"held_out: {scenes + 1} scenes cannot be told apart"):
        make_scenes(tmp_path / "web", ScenesConfig(**few, held_out=scenes + 1))
    assert not (tmp_path / "web").exists()


def test_the_url_table_leads_to_the_pictures_and_uids_do_not_depend_on_the_address(
    paths: ScenesPaths, tmp_path: Path
) -> None:
    with serve_scenes(paths.folder) as base_url:
        table = pq.read_table(url_table(paths, base_url, tmp_path / "urls.parquet")).to_pylist()
        with urllib.request.urlopen(table[0]["url"], timeout=5) as answer:
            assert Image.open(io.BytesIO(answer.read())).size == (64, 64)
    other = pq.read_table(url_table(paths, "http://127.0.0.1:9/", tmp_path / "other.parquet")).to_pylist()
    assert [row["uid"] for row in table] == [row["uid"] for row in other]
    assert [row["alt"] for row in table] == [row["alt"] for row in pq.read_table(paths.rows).to_pylist()]
    assert other[0]["url"].startswith("http://127.0.0.1:9/images/")
