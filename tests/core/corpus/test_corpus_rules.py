"""Each rule of publishing against a slow and obvious one, and what becomes of those that it rejects."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip_core.config import parse_section
from blip_core.corpus.explain import explain
from blip_core.corpus.rules import REJECTIONS, ImageRules, PublishConfig, TextRules, rules_of
from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ANNOTATION_VERSION, write_part
from blip_core.corpus.selection import PublishSummary, publish_shard, read_rules
from blip_core.corpus.verdicts import PREDICATE_SCHEMA, check_publish, judge
from blip_core.data.shards import check_part
from blip_core.errors import ConfigError
from blip_core.workspace import Workspace

SHARD = "aaaa000000000001"


def candidates(texts: list[str | None], sizes: list[tuple[int, int]] | None = None) -> pa.Table:
    """One image a text; what is None has no scores."""
    rows = [
        {"uid": f"{number:04d}", "text": text or "", "source": "web", "candidate": 0, "itm_score": 0.9}
        | ({} if text is not None else {"itm_score": None, "reason": "empty_text"})
        | {"width": sizes[number][0] if sizes else 64, "height": sizes[number][1] if sizes else 48}
        for number, text in enumerate(texts)
    ]
    return pa.Table.from_pylist(rows, PREDICATE_SCHEMA)


def verdicts(table: pa.Table, config: PublishConfig) -> list[str | None]:
    return judge(table, config, None, "a test").to_pylist()


def with_text(**rules: object) -> PublishConfig:
    return PublishConfig(where="true", text=TextRules(**rules))  # type: ignore[arg-type]


def with_images(**rules: object) -> PublishConfig:
    return PublishConfig(where="true", images=ImageRules(**rules))  # type: ignore[arg-type]


def repeated(text: str) -> float:
    words = text.split()
    return 1 - len({word.lower() for word in words}) / len(words) if words else 0.0


SLOW: list[tuple[PublishConfig, str, Callable[[str], bool]]] = [
    (with_text(min_words=3), "few_words", lambda text: len(text.split()) >= 3),
    (with_text(max_words=2), "many_words", lambda text: len(text.split()) <= 2),
    (with_text(min_characters=4), "few_characters", lambda text: len(text) >= 4),
    (with_text(max_characters=9), "many_characters", lambda text: len(text) <= 9),
    (with_text(max_repeated=0.5), "repetitive", lambda text: repeated(text) <= 0.5),
    (with_text(max_repeated=0.0), "repetitive", lambda text: repeated(text) == 0),
]

WORDS = st.sampled_from(["a", "A", "red", "Red", "bus", "été", "ÉTÉ", "犬", "👩‍🚀", "don't", "--"])
GAPS = st.sampled_from([" ", "  ", "\t", "\n", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85", "\x1c", "\u200b"])
TEXTS = st.lists(st.tuples(WORDS, GAPS), max_size=12).map(lambda parts: "".join(word + gap for word, gap in parts))


@given(texts=st.lists(TEXTS, min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize(("config", "reason", "passes"), SLOW)
def test_a_rule_about_words_and_characters_is_the_slow_one(
    texts: list[str], config: PublishConfig, reason: str, passes: Callable[[str], bool]
) -> None:
    assert verdicts(candidates(list(texts)), config) == [None if passes(text) else reason for text in texts]


@given(sizes=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_rules_about_sizes_are_the_slow_ones(sizes: list[tuple[int, int]]) -> None:
    table = candidates(["a text"] * len(sizes), sizes)
    slow = [
        (with_images(min_side=100), "small_image", [min(size) >= 100 for size in sizes]),
        (with_images(max_side=400), "large_image", [max(size) <= 400 for size in sizes]),
        (with_images(max_aspect=2.5), "aspect", [max(size) <= 2.5 * min(size) for size in sizes]),
    ]
    for config, reason, passes in slow:
        assert verdicts(table, config) == [None if passed else reason for passed in passes]


FILES = [
    "IMG_1234.jpg", "img 1234", "DSC01234", "DSCN1234.JPG", "P1010001", "_MG_0042", "PXL_20210101_123456789",
    "photo.jpeg",
    "my holiday photo.png", "IMG-20180101-WA0001", "20180101_123456", "image (3)", "Screenshot 2020-01-02 at 10.11.12",
    "image001", "0123456789abcdef0123", "123e4567-e89b-12d3-a456-426614174000", "42", " 0815/7 ", "scan0001.tiff",
]  # fmt: skip
NO_FILES = [
    "a dog", "IMG", "a photo of a dog", "image of 3 men", "Image of the Year 2012 Winner", "Route 66", "3 dogs",
    "screenshot", "deadbeef", "page 12 of the book", "Dr. Who.", "the file.", "an apple.jpg of my eye", "",
]  # fmt: skip
MARKUP = [
    "<b>bold</b>", "a dog<br/>", "<img src='x'>", "Tom &amp; Jerry", "caf&#233;", "see http://a.test/x",
    "www.example.com",
    "[url=x]y[/url]", "[a](b)", "![dog](dog.jpg)", "{{ title }}", "${name}", "<!-- x -->", "<?php echo 1 ?>", "ftp://a",
]  # fmt: skip
NO_MARKUP = [
    "a < b and b > c",
    "R&D department",
    "AT&T",
    "I <3 dogs",
    "1:30",
    "a; b",
    "[sic]",
    "price: 5$",
    "@home",
    "a/b",
    "",
]


@pytest.mark.parametrize(
    ("rule", "rejected", "kept"),
    [("file_name", FILES, NO_FILES), ("markup", MARKUP, NO_MARKUP)],
)
def test_file_names_and_markup_are_told_from_texts(rule: str, rejected: list[str], kept: list[str]) -> None:
    config = with_text(reject_file_names=rule == "file_name", reject_markup=rule == "markup")
    found = dict(zip([*rejected, *kept], verdicts(candidates([*rejected, *kept]), config), strict=True))
    assert {text: reason for text, reason in found.items() if reason is None} == dict.fromkeys(kept)
    assert {text: reason for text, reason in found.items() if reason} == dict.fromkeys(rejected, rule)


def test_a_text_that_is_clearly_in_another_language_is_rejected_and_one_that_nobody_can_tell_is_not() -> None:
    pytest.importorskip("lingua")
    english = [
        "two zebras standing in a field of tall grass",
        "a group of people",
        "a man riding a wave",
        "Nike Air Max 90",
    ]
    german = ["Sonnenuntergang am Meer im September", "ein altes Haus auf dem Land"]
    others = ["un chat noir sur un canapé", "桜の花が咲いています", "два человека гуляют по городу"]
    told = verdicts(candidates([*english, *german, *others, None]), with_text(languages=("en",)))
    assert told == [*[None] * 4, *["other_language"] * 5, "no_scores"]
    both = verdicts(candidates([*english, *german, *others]), with_text(languages=("en", "de")))
    assert both == [*[None] * 6, *["other_language"] * 3]


def test_the_reason_is_that_of_the_first_rule_that_fails() -> None:
    config = PublishConfig(
        where="candidate = 0 AND text <> 'no'",
        text=TextRules(min_words=2, reject_file_names=True, reject_markup=True),
        images=ImageRules(min_side=50, max_aspect=2),
    )
    texts = [None, "no", "x.jpg", "my x.jpg", "my <b>x</b>", "my dog", "my dog", "my dog"]
    sizes = [(64, 64)] * 5 + [(200, 40), (200, 60), (64, 64)]
    expected = ["no_scores", "where", "few_words", "file_name", "markup", "small_image", "aspect", None]
    assert verdicts(candidates(texts, sizes), config) == expected
    reasons = list(REJECTIONS)
    asked = [rule.reason for rule in rules_of(config)]
    assert asked == sorted(asked, key=reasons.index)


def publish(workspace: Workspace, config: PublishConfig) -> tuple[PublishSummary, Path]:
    made = workspace.round(1)
    part, target = (folder / f"{SHARD}.parquet" for folder in (made.annotations, made.corpus))
    arguments = (config.where, 1, config.best_of, config.text, config.images)
    return publish_shard(part, workspace.shard(SHARD), target, *arguments), target


def annotate(workspace: Workspace, texts: list[str]) -> None:
    """Those texts for the five images of the shard, in their order, two each; of one score each pair."""
    part = workspace.round(1).annotations / f"{SHARD}.parquet"
    rows = pq.read_table(part).to_pylist()
    scored = {"itm_score": 0.9, "itc_score": 0.1, "reason": None}
    rows = [row | scored | {"text": text} for row, text in zip(rows, texts, strict=True)]
    write_part(part, pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), ANNOTATION_VERSION, "0")


TWO_EACH = ["a dog", "IMG_1.jpg", "a cat", "sale sale sale sale", "a <b>", "42", "a bus", "x", "a tree", "a red tree"]


def test_the_part_says_how_many_each_rule_rejected_and_which_rules_they_were(workspace: Workspace) -> None:
    annotate(workspace, TWO_EACH)
    text = TextRules(min_words=2, max_repeated=0.5, reject_file_names=True, reject_markup=True, languages=None)
    config = PublishConfig("itm_score > 0.5", text=text, images=ImageRules(min_side=20))
    summary, target = publish(workspace, config)
    assert [row["text"] for row in pq.read_table(target).to_pylist()] == [
        "a dog",
        "a cat",
        "a bus",
        "a tree",
        "a red tree",
    ]
    assert summary.by_reason == {"few_words": 3, "repetitive": 1, "markup": 1}
    assert (summary.kept, summary.rejected) == (5, 5)
    metadata = check_part(target, "corpus/1")
    assert json.loads(metadata["capfilt.rejections"]) == summary.by_reason
    assert read_rules(metadata) == config
    again, _ = publish(workspace, config)
    assert (again.skipped, again.by_reason) == (True, summary.by_reason)


def test_another_rule_makes_the_part_anew_from_the_same_annotations(workspace: Workspace) -> None:
    annotate(workspace, TWO_EACH)
    before = (workspace.round(1).annotations / f"{SHARD}.parquet").read_bytes()
    for text, kept in ((TextRules(), 10), (TextRules(min_words=2), 7), (TextRules(max_words=2), 8), (TextRules(), 10)):
        summary, _ = publish(workspace, PublishConfig("true", text=text))
        assert (summary.skipped, summary.kept, summary.rejected) == (False, kept, 10 - kept)
    assert (workspace.round(1).annotations / f"{SHARD}.parquet").read_bytes() == before


def test_explain_names_the_rule(workspace: Workspace) -> None:
    annotate(workspace, TWO_EACH)
    publish(workspace, PublishConfig("itm_score > 0.5", text=TextRules(reject_file_names=True, max_repeated=0.5)))
    told = {
        row["text"]: (row["kept"], row["rejected_by"], row["why"])
        for uid in ("aaaa-0", "aaaa-1")
        for row in explain(workspace, uid)["rounds"][0]["candidates"]
    }
    assert told == {
        "a dog": (True, None, "itm_score > 0.5 is true"),
        "IMG_1.jpg": (False, "file_name", "file_name: it is a file's name, or a number"),
        "a cat": (True, None, "itm_score > 0.5 is true"),
        "sale sale sale sale": (
            False, "repetitive", "repetitive: more than `text.max_repeated` of its words repeat an earlier one"
        ),
    }  # fmt: skip


def test_rules_come_from_nested_sections_of_the_configuration() -> None:
    given_values = {"text": {"min_words": 3, "languages": ["en", "de"]}, "images": {"unique": True, "per_domain": 10}}
    config = parse_section(PublishConfig, given_values)
    assert config.text == TextRules(min_words=3, languages=("en", "de"))
    assert config.images == ImageRules(unique=True, per_domain=10)
    assert parse_section(PublishConfig, {}) == PublishConfig()
    assert [rule.reason for rule in rules_of(PublishConfig())] == ["where"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (with_text(min_words=5, max_words=4), r"publish\.text\.min_words: 5 is above text\.max_words, 4"),
        (with_images(min_side=300, max_side=200), r"publish\.images\.min_side: 300 is above images\.max_side, 200"),
        (with_text(languages=()), r"publish\.text\.languages: names no language"),
        (with_text(languages=("en", "english")), r"publish\.text\.languages: 'english' is not among .*\bde\b"),
        (PublishConfig(where="itm_skore > 1"), "itm_skore"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused_by_name(config: PublishConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        check_publish(config)
    assert "\n" not in str(caught.value)


def test_a_pattern_of_a_rule_ends_no_string_of_sql() -> None:
    for rule in rules_of(with_text(min_words=1, max_repeated=0.1, reject_file_names=True, reject_markup=True)):
        assert rule.passes.count("'") % 2 == 0
        assert re.search(r"''", rule.passes) is None


def test_the_documented_reasons_and_their_query_are_those_that_there_are(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = (Path(__file__).parents[3] / "docs" / "selection.md").read_text()
    assert re.findall(r"^\| `(\w+)` \| (.*) \|$", document, re.MULTILINE) == list(REJECTIONS.items())
    annotate(workspace, TWO_EACH)
    publish(workspace, PublishConfig("candidate = 0", text=TextRules(min_words=2)))
    monkeypatch.chdir(workspace.root)
    (block,) = re.findall(r"^```python\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    scope: dict[str, duckdb.DuckDBPyRelation] = {}
    exec(block, scope)
    assert scope["rejections"].fetchall() == [("where", 5)]
    publish(workspace, PublishConfig(text=TextRules(min_words=2, reject_markup=True)))
    exec(block, scope)
    assert scope["rejections"].fetchall() == [("few_words", 3), ("markup", 1)]
