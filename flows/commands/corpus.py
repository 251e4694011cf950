"""Commands that read what a workspace holds, and say which round of it is shown."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blip_core.errors import CapfiltError, ConfigError
from flows.commands.shared import load, print_json
from flows.options import SOURCES, Json, TokenizerOption

if TYPE_CHECKING:
    from blip_core.workspace import Workspace

InWorkspace = Annotated[str, typer.Option("--workspace", help="The workspace.")]

app = typer.Typer()


@app.command()
def query(
    sql: Annotated[
        str | None, typer.Argument(metavar="[SQL]", help="One SELECT over the catalog's views; without it a shell.")
    ] = None,
    workspace: Annotated[str, typer.Option(help="The workspace to ask.")] = ".",
    format: Annotated[
        Literal["table", "json", "csv", "parquet"], typer.Option(help="What is printed; a table shows 100 rows.")
    ] = "table",
    filter: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT", help="The Filter of the round, for image_search, where the workspace has it not."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """SQL over the workspace: the views images, annotations, corpus, rounds, shards, failures, ... Read only."""
    from blip_core.corpus.query import run_query
    from blip_core.workspace import Workspace
    from flows.shell import run_shell
    from flows.tables import show_as

    opened = Workspace.existing(workspace)
    show = show_as("json" if json else format)
    if sql is None:
        run_shell(opened, show, filter)
    else:
        show(run_query(opened, sql, filter))


@app.command()
def sweep(
    predicates: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WHERE]...", help="Thresholds of itm_score, such as 0.7, or predicates in SQL."),
    ] = None,
    workspace: InWorkspace = ".",
    round: Annotated[int | None, typer.Option("--round", help="The round; the last one if not given.", min=1)] = None,
    best_of: Annotated[bool, typer.Option("--best-of", help="Of an image's synthetic texts, only the best.")] = False,
    examples: Annotated[int, typer.Option(help="Pairs to show of each edge.", min=0, max=100)] = 2,
    config: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG.yaml", help="Its rules of texts and sizes are asked too (docs/selection.md)."),
    ] = None,
    json: Json = False,
) -> None:
    """What other thresholds or predicates would keep of the annotations that stand; no model is run."""
    from blip_core.corpus.sweep import THRESHOLDS, not_asked, predicate_of
    from blip_core.corpus.sweep import sweep as sweep_round
    from blip_core.workspace import Workspace
    from flows.summary import print_sweep

    opened = Workspace.existing(workspace)
    number = round if round is not None else max(opened.round_numbers(), default=1)
    wheres = [predicate_of(given) for given in predicates or THRESHOLDS]
    rules = None if config is None else load(config, None, {}).publish
    if rules is not None and (left := not_asked(rules)):
        typer.echo(f"sweep: publishing may keep less, for {', '.join(left)} is not asked here", err=True)
    rows = sweep_round(opened, number, wheres, best_of, examples, rules)
    print_json(rows) if json else print_sweep(rows)


@app.command()
def explain(
    uid: Annotated[str, typer.Argument(metavar="UID", help="The image's key, the column uid of every view.")],
    workspace: InWorkspace = ".",
    replay: Annotated[
        bool, typer.Option("--replay", help="Computes captions and scores again; exit status 1 where they differ.")
    ] = False,
    captioner: Annotated[
        str | None, typer.Option(metavar="SRC", help=f"With --replay, where no round has the Captioner: {SOURCES}.")
    ] = None,
    filter: Annotated[
        str | None, typer.Option(metavar="SRC", help=f"With --replay, where no round has the Filter: {SOURCES}.")
    ] = None,
    tokenizer: TokenizerOption = None,
    round: Annotated[int | None, typer.Option(help="With --replay: this round's texts alone.", min=1)] = None,
    json: Json = False,
) -> None:
    """One image's story: its download, every text with its scores, who made and judged it, and why it was kept."""
    from blip_core.corpus.explain import explain as story_of
    from blip_core.workspace import Workspace
    from flows.story import print_story

    if not replay and any(given is not None for given in (captioner, filter, tokenizer, round)):
        raise ConfigError("--captioner, --filter, --tokenizer and --round: are for --replay; give it as well")
    opened = Workspace.existing(workspace)
    story = story_of(opened, uid)
    if replay:
        from flows.replay import replay_story

        story["replay"] = replay_story(opened, story, captioner, filter, tokenizer, round)
    print_json(story) if json else print_story(story)
    if differing := [str(made["round"]) for made in story.get("replay", []) if not made["agrees"]]:
        raise CapfiltError(f"explain --replay: {uid!r} does not come out as recorded in round {', '.join(differing)}")


@app.command()
def report(
    workspace: Annotated[str, typer.Argument(metavar="WORKSPACE", help="The workspace to report on.")],
    round: Annotated[int | None, typer.Option("--round", help="The round; the last one if not given.")] = None,
    json: Json = False,
) -> None:
    """The round's report: report.html and the cards of corpus and models, or its numbers with --json."""
    from blip_core.evaluation.card import write_card
    from blip_core.evaluation.model_card import write_round_cards
    from blip_core.evaluation.report import build_report, write_report
    from blip_core.workspace import Workspace

    opened = Workspace.existing(workspace)
    number = round if round is not None else max(opened.round_numbers(), default=1)
    if json:
        print_json(build_report(opened, number))
    else:
        typer.echo(write_report(opened, number))
        write_card(opened, number)
        write_round_cards(opened, number)


@app.command()
def export(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The folder to write: new, or of this very export.")],
    format: Annotated[
        Literal["parquet", "webdataset", "uids", "blip", "coco", "csv"],
        typer.Option(help="What the files are (docs/export.md); parquet: for Hugging Face datasets, uids: DataComp's."),
    ] = "parquet",
    workspace: InWorkspace = ".",
    round: Annotated[int | None, typer.Option(help="The round; the promoted one if not given.", min=1)] = None,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="A predicate over the corpus, such as: itm_score > 0.9")
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The most that a file holds, such as 500MB or 1GiB; uids is one file.")
    ] = "500MB",
    config: Annotated[
        Path | None, typer.Option(metavar="CONFIG.yaml", help="Its human table has the images of the human pairs.")
    ] = None,
    json: Json = False,
) -> None:
    """The corpus for other programs, in files of a size, with checksums; goes on where it was stopped."""
    from dataclasses import asdict

    from blip_core import stores
    from blip_core.corpus.export import export_corpus
    from blip_core.corpus.export_format import parse_size
    from blip_core.workspace import Workspace
    from flows.summary import print_export
    from flows.terminal import TerminalDisplay

    size = parse_size(shard_size)
    human = None if config is None else load(config, None, {}).human
    with TerminalDisplay() as display:
        summary = export_corpus(
            Workspace.existing(workspace),
            stores.located(target),
            format,
            round=round,
            where=where,
            shard_size=size,
            human=human,
            progress=lambda done, total: display.show("export", done, total, ""),
        )
    print_json(asdict(summary)) if json else print_export(summary)


@app.command()
def rounds(workspace: InWorkspace = ".", json: Json = False) -> None:
    """The rounds, what became of each, and their numbers."""
    from blip_core.workspace import Workspace

    print_rounds(Workspace.existing(workspace), json)


def print_rounds(workspace: "Workspace", json: bool) -> None:
    """Prints the rounds on stdout: all that is known of them as JSON, or for people."""
    from blip_core.corpus.rounds import list_rounds
    from flows.summary import print_rounds_table

    listed = list_rounds(workspace)
    print_json(listed) if json else print_rounds_table(listed)


@app.command()
def promote(
    number: Annotated[int, typer.Argument(metavar="N", help="The round whose corpus is to be shown.", min=1)],
    workspace: InWorkspace = ".",
) -> None:
    """Shows the corpus of another round, whatever its verdict."""
    from blip_core.corpus.catalog import build_catalog
    from blip_core.corpus.rounds import promote as promote_round
    from blip_core.workspace import Workspace

    opened = Workspace.existing(workspace)
    promote_round(opened, number)
    build_catalog(opened)
    typer.echo(f"promote: the corpus is that of round {number}", err=True)


@app.command()
def rollback(workspace: InWorkspace = ".") -> None:
    """Shows the corpus of the round that was promoted before."""
    from blip_core.corpus.catalog import build_catalog
    from blip_core.corpus.rounds import rollback as roll_back
    from blip_core.workspace import Workspace

    opened = Workspace.existing(workspace)
    number = roll_back(opened)
    build_catalog(opened)
    typer.echo(f"rollback: the corpus is that of round {number}", err=True)
