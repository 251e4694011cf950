"""Commands that read what a workspace holds: query, report."""

from typing import Annotated

import typer

from flows.commands.shared import print_json, show_rows
from flows.options import Json

app = typer.Typer()


@app.command()
def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT over the catalog's views.")],
    workspace: Annotated[str, typer.Option(help="The workspace to ask.")] = ".",
    json: Json = False,
) -> None:
    """SQL over the workspace: the views images, annotations, corpus, rounds, training_metrics. Read only."""
    from blip_core.corpus.query import run_query
    from blip_core.workspace import Workspace

    rows = run_query(Workspace.existing(workspace), sql)
    show_rows(rows, json)


@app.command()
def report(
    workspace: Annotated[str, typer.Argument(metavar="WORKSPACE", help="The workspace to report on.")],
    round: Annotated[int | None, typer.Option("--round", help="The round; the last one if not given.")] = None,
    json: Json = False,
) -> None:
    """The round's report: report.html, or its numbers with --json."""
    from blip_core.evaluation.report import build_report, write_report
    from blip_core.workspace import Workspace

    opened = Workspace.existing(workspace)
    number = round if round is not None else max(opened.round_numbers(), default=1)
    if json:
        print_json(build_report(opened, number))
    else:
        typer.echo(write_report(opened, number))
