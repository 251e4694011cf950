"""docs/sql.md: its twenty questions have the answers that stand there, and leave no view and no macro out."""

import re
from pathlib import Path

import duckdb
import pytest
from services.scenes_corpus import make_corpus
from services.sql_answers import BLOCK, DOCUMENT, Question, answer, answered, questions

from blip_core.corpus.catalog import VIEW_MEANINGS
from blip_core.corpus.macros import MACROS
from blip_core.corpus.query import run_query
from blip_core.corpus.sql import nodes, syntax_tree
from blip_core.corpus.sweep import predicate_of, sweep
from blip_core.workspace import Workspace

TEXT = DOCUMENT.read_text(encoding="utf-8")
QUESTIONS = questions(TEXT)
BY_TEXT = {"embed_text", "image_search"}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The corpus that the document asks."""
    return make_corpus(tmp_path_factory.mktemp("sql") / "work")


def named(sql: str) -> set[str]:
    """The views and functions that a statement names, as DuckDB reads it."""
    tree = syntax_tree(duckdb.connect(), sql)
    keys = ("table_name", "function_name")
    return {str(node[key]) for node in nodes(tree) for key in keys if key in node}


def ids(question: Question) -> str:
    return question.heading.split(".")[0]


@pytest.mark.parametrize("question", QUESTIONS, ids=ids)
def test_a_question_has_the_answer_that_stands_there(question: Question, corpus: Workspace) -> None:
    assert answer(corpus, question.sql) == question.answer


def test_there_are_twenty_questions_each_with_an_answer() -> None:
    headings = re.findall(r"^## (\d+)\. .+\?$", TEXT, re.MULTILINE)
    assert headings == [str(number) for number in range(1, 21)]
    assert {ids(question) for question in QUESTIONS} == set(headings)
    assert len(BLOCK.findall(TEXT)) == len(re.findall(r"^```sql$", TEXT, re.MULTILINE)) == len(QUESTIONS)


def test_every_view_and_every_macro_is_asked() -> None:
    used = set().union(*(named(question.sql) for question in QUESTIONS))
    assert set(VIEW_MEANINGS) - used == set()
    assert set(MACROS) - used == set()


def test_an_answer_of_several_rows_says_their_order(corpus: Workspace) -> None:
    tree_of = duckdb.connect()
    for question in QUESTIONS:
        tree = syntax_tree(tree_of, question.sql)
        assert tree is not None
        ordered = {modifier["type"] for modifier in tree["statements"][0]["node"]["modifiers"]}
        assert "ORDER_MODIFIER" in ordered or run_query(corpus, question.sql).num_rows == 1, question.sql


def test_answers_do_not_hang_on_the_last_digits_of_an_embedding(tmp_path: Path) -> None:
    shaken = make_corpus(tmp_path / "work", shake=1e-5)
    assert answered(shaken, TEXT) == TEXT


def test_duckdb_alone_answers_the_same(corpus: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus.root)
    anywhere = [question.sql for question in QUESTIONS if not named(question.sql) & BY_TEXT]
    assert len(anywhere) >= 20
    with duckdb.connect("catalog.duckdb", read_only=True) as connection:
        for sql in anywhere:
            assert connection.sql(sql).to_arrow_table().equals(run_query(corpus, sql)), sql


def test_capfilt_sweep_counts_what_the_sql_counts(corpus: Workspace) -> None:
    (question,) = [one for one in QUESTIONS if one.heading == "6. What would another threshold keep?"]
    counted = run_query(corpus, question.sql).to_pylist()
    swept = sweep(corpus, 2, [predicate_of(str(row["threshold"])) for row in counted])
    names = ("images", "web", "synthetic")
    assert [[row[name] for name in names] for row in swept] == [[row[name] for name in names] for row in counted]
    assert [row["estimated_noise"] for row in swept] == pytest.approx([row["noise"] for row in counted], abs=5e-5)
