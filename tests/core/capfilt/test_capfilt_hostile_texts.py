"""Web texts that mean harm, through annotation and publishing: clean, or refused with a reason; the shard keeps all."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip_core.capfilt.annotate import annotate_shard
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig
from blip_core.corpus.selection import publish_human, publish_shard
from blip_core.data.shards import SHARD_SCHEMA, read_shard, write_shard
from blip_core.data.tables import PairTable
from blip_core.med.decoding import GenerationConfig
from blip_core.texts import MAX_CHARACTERS, clean_text

GENERATION = GenerationConfig(max_length=3, min_length=1)
CONFIG = AnnotateConfig(batch_size=16, workers=0)
MEGABYTE = 2**20
Models = tuple[Captioner, Filter]
MakeShard = Callable[..., Path]

# Text: the candidate that it is, and the reason why it has no scores.
TEXTS: dict[str, tuple[str, str | None]] = {
    "a red circle": ("a red circle", None),
    "a \u202egod red\u202c circle": ("a god red circle", None),
    "a r\u200be\u2060d\ufeff star": ("a red star", None),
    "a\x00 star\x1b[0m\x7f": ("a star[0m", None),
    "a\nblue\tsquare": ("a blue square", None),
    "\u200b\u202e\u2066\x07": ("", "empty_text"),
    "": ("", "empty_text"),
    "\ufffd": ("\ufffd", None),
    "a" * MEGABYTE: ("a" * MAX_CHARACTERS, "text_too_long"),
    "!" * MEGABYTE: ("!" * MAX_CHARACTERS, "text_too_long"),
    "\u202e" * MEGABYTE: ("", "text_too_long"),
    "a star " * MEGABYTE: (("a star " * MEGABYTE)[:MAX_CHARACTERS], "text_too_long"),
    "," * MAX_CHARACTERS: ("," * MAX_CHARACTERS, None),
}


def with_texts(shard: Path, texts: list[str]) -> Path:
    """The same shard with other web texts."""
    rows = read_shard(shard).to_pylist()
    changed = [row | {"caption": text} for row, text in zip(rows, texts, strict=True)]
    write_shard(shard, [pa.Table.from_pylist(changed, SHARD_SCHEMA)], "settings", len(rows))
    return shard


def web_rows(part: Path) -> list[tuple[str, str | None]]:
    return [(row["text"], row["reason"]) for row in pq.read_table(part).to_pylist() if row["source"] == "web"]


def test_a_candidate_is_what_can_be_seen_of_its_text_and_the_shard_keeps_what_was_delivered(
    make_shard: MakeShard, models: Models, tmp_path: Path
) -> None:
    shard = with_texts(make_shard("hostile", [*range(len(TEXTS))]), [*TEXTS])
    part, corpus = tmp_path / "annotations.parquet", tmp_path / "corpus.parquet"
    summary = annotate_shard(shard, part, *models, CONFIG, GENERATION, 0)
    assert web_rows(part) == [*TEXTS.values()]
    assert summary.candidates == 2 * len(TEXTS)
    assert read_shard(shard, ["caption"])["caption"].to_pylist() == [*TEXTS]
    published = publish_shard(part, shard, corpus, "source = 'web'", 1)
    kept = pq.read_table(corpus)["text"].to_pylist()
    assert kept == [text for text, reason in TEXTS.values() if reason is None]
    assert all(clean_text(text) == text for text in kept)
    assert published.kept + published.rejected == 2 * len(TEXTS)


def test_texts_that_differ_in_what_cannot_be_seen_have_the_same_scores(
    make_shard: MakeShard, models: Models, tmp_path: Path
) -> None:
    texts = ["two green rings", "t\u200bwo gr\u202eeen r\x08ings", "two\x85green\u2028rings"]
    shard = with_texts(make_shard("same", [5, 5, 5]), texts)
    annotate_shard(shard, tmp_path / "part.parquet", *models, CONFIG, GENERATION, 0)
    rows = pq.read_table(tmp_path / "part.parquet").to_pylist()
    scores = [(row["text"], row["itm_score"], row["itc_score"]) for row in rows if row["source"] == "web"]
    assert [text for text, _, _ in scores] == [texts[0]] * 3
    for _, itm, itc in scores[1:]:
        assert (itm, itc) == pytest.approx(scores[0][1:], abs=1e-5)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=200), min_size=4, max_size=4))
def test_any_text_has_its_row_with_scores_or_a_reason(
    make_shard: MakeShard, models: Models, tmp_path: Path, texts: list[str]
) -> None:
    shard = with_texts(make_shard("any", [1, 2, 3, 4]), texts)
    part = tmp_path / "part.parquet"
    part.unlink(missing_ok=True)
    annotate_shard(shard, part, *models, CONFIG, GENERATION, 0)
    rows = [row for row in pq.read_table(part).to_pylist() if row["source"] == "web"]
    assert [row["text"] for row in rows] == [clean_text(text) for text in texts]
    for row in rows:
        assert (row["itm_score"] is None) == (row["reason"] == "empty_text")


def test_human_captions_are_cleaned_as_well_and_what_is_too_long_is_rejected(
    make_shard: MakeShard, tmp_path: Path
) -> None:
    image = read_shard(make_shard("one", [1]), ["image"])["image"][0].as_py()
    captions = ["a \u202ered\u202c star", "\u200b", "b" * (MAX_CHARACTERS + 1), "a star"]
    pq.write_table(pa.table({"image": [image], "caption": [captions]}), tmp_path / "human.parquet")
    summary = publish_human(PairTable(str(tmp_path / "human.parquet")), tmp_path / "corpus", 1)
    (part,) = (tmp_path / "corpus").glob("*.parquet")
    rows = pq.read_table(part).to_pylist()
    assert [(row["candidate"], row["text"]) for row in rows] == [(0, "a red star"), (3, "a star")]
    assert (summary.kept, summary.rejected) == (2, 2)


SCRIPT = """
    import pathlib, sys, torch
    from blip_core.capfilt.annotate import annotate_shard
    from blip_core.capfilt.captioner import Captioner
    from blip_core.capfilt.filter import Filter
    from blip_core.capfilt.parts import AnnotateConfig
    from blip_core.med.decoding import GenerationConfig
    if __name__ == "__main__":
        torch.set_num_threads(1)
        captioner, filter, shard, target = sys.argv[1:]
        models = Captioner.load(captioner), Filter.load(filter)
        config = AnnotateConfig(workers=0, batch_size=128)
        annotate_shard(pathlib.Path(shard), pathlib.Path(target), *models, config, GenerationConfig(max_length=2), 0)
        (peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(peak.split()[1])
"""


def test_four_times_the_megabytes_of_text_take_hardly_more_memory(
    make_shard: MakeShard, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(SCRIPT))
    few, many, letters = 256, 1024, MEGABYTE // 4
    peaks = []
    for count in (few, many):
        shard = with_texts(make_shard(str(count), [1] * count), ["a star, " * (letters // 8)] * count)
        command = [sys.executable, tmp_path / "program.py", *checkpoints, shard, tmp_path / f"{count}.part"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout) * 1024)
    assert peaks[1] - peaks[0] < (many - few) * letters / 3, [f"{peak / MEGABYTE:.0f} MB" for peak in peaks]
    assert web_rows(tmp_path / f"{many}.part") == [(("a star, " * 1000)[:MAX_CHARACTERS], "text_too_long")] * many
