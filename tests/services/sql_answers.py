"""docs/sql.md: its questions, and what `capfilt query` prints for each; `make sql` writes the answers anew.

A question is a heading with one or more blocks of SQL, and after each the block of what is printed.
"""

import io
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from blip_core.corpus.query import run_query
from blip_core.workspace import Workspace
from flows.tables import print_rows
from services.scenes_corpus import make_corpus

DOCUMENT = Path(__file__).parents[2] / "docs" / "sql.md"
WIDTH = 118
BLOCK = re.compile(r"^```sql\n(?P<sql>.*?)^```\n\n```text\n(?P<answer>.*?)^```$", re.DOTALL | re.MULTILINE)


class Question(NamedTuple):
    """One of the document's SQL statements: the heading above it, and what it says is printed."""

    heading: str
    sql: str
    answer: str


def questions(document: str) -> list[Question]:
    """All statements of the document, in order."""
    found = []
    for section in re.split(r"^## ", document, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0]
        found += [Question(heading, match["sql"], match["answer"]) for match in BLOCK.finditer(section)]
    return found


def answer(workspace: Workspace, sql: str) -> str:
    """What `capfilt query` prints."""
    printed = io.StringIO()
    print_rows(run_query(workspace, sql), Console(file=printed, width=WIDTH, highlight=False))
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines()) + "\n"


def answered(workspace: Workspace, document: str) -> str:
    """The document with all answers anew."""

    def anew(match: re.Match[str]) -> str:
        return f"```sql\n{match['sql']}```\n\n```text\n{answer(workspace, match['sql'])}```"

    return BLOCK.sub(anew, document)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        made = make_corpus(Path(folder) / "work")
        DOCUMENT.write_text(answered(made, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
