"""The command that takes images out of a workspace, for opt-outs and take-downs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from blip_core.errors import ConfigError
from flows.commands.shared import print_json
from flows.options import Json

if TYPE_CHECKING:
    from blip_core.corpus.forget import Forgotten
    from blip_core.workspace import Workspace

app = typer.Typer()


@app.command()
def forget(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[URL|SHA256|DOMAIN]...", help="What is to go; without any, what is denied already."),
    ] = None,
    workspace: Annotated[str, typer.Option("--workspace", help="The workspace.")] = ".",
    file: Annotated[
        str | None, typer.Option("--file", metavar="LIST", help="More names, one a line; # begins a comment.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Says what would go; changes nothing.")] = False,
    json: Json = False,
) -> None:
    """Removes images from the whole workspace, keeps them out, and lists the checkpoints that were trained on them."""
    from blip_core.corpus.forget import forget as forget_named
    from blip_core.corpus.names import parse_names, read_names
    from blip_core.stores import located
    from blip_core.workspace import Workspace
    from flows.server import only_one
    from flows.terminal import TerminalDisplay

    given = [*(names or []), *(read_names(located(file)) if file else [])]
    if file and not given:
        raise ConfigError(f"--file {file}: names nothing")
    denied = parse_names(given)
    opened = Workspace.existing(workspace)
    if dry_run:
        found = forget_named(opened, denied, dry_run=True)
    else:
        with only_one(opened), TerminalDisplay() as display:
            found = forget_named(opened, denied, progress=lambda done, total: display.show("forget", done, total, ""))
            _remake(opened, found)
    print_json(found._asdict()) if json else _print(found, dry_run)


def _remake(workspace: "Workspace", found: "Forgotten") -> None:
    """Report and card of the rounds whose ones were removed, from what is left."""
    from blip_core.evaluation.card import write_card
    from blip_core.evaluation.report import write_report

    for number in found.rounds:
        folder = f"rounds/{number:04d}/"
        if f"{folder}report.html" in found.pages:
            write_report(workspace, number)
        if f"{folder}corpus/README.md" in found.pages:
            write_card(workspace, number)


def _print(found: "Forgotten", dry_run: bool) -> None:
    """For people, on stdout; what they have to do themselves, on stderr."""
    typer.echo(f"{'would remove' if dry_run else 'removed'}: {_counted(found)}")
    for page in found.pages:
        typer.echo(f"{'would remove' if dry_run else 'removed'}: {page}{_again(page)}")
    if found.history:
        typer.echo(f"{'would remove' if dry_run else 'removed'}: the history of the local Prefect server")
    for model in found.checkpoints:
        typer.echo(f"trained on it: {model['folder']} ({model['digest']}): {model['how']}")
    if not dry_run:
        typer.echo("forget: tables, exports and Prefect servers of yours are not touched: docs/forgetting.md", err=True)


def _counted(found: "Forgotten") -> str:
    numbers: dict[str, Any] = {
        f"rows of {len(found.shards)} shards": found.rows,
        "images": found.images,
        "annotations": found.annotations,
        "embeddings": found.embeddings,
        "texts of corpora": found.corpus,
        "human pairs": found.human,
        "plans": found.plans,
    }
    return ", ".join(f"{number:,} {name}" for name, number in numbers.items())


def _again(page: str) -> str:
    if page.endswith("audit.html"):
        return "; capfilt audit draws another sample"
    return "; made anew without it" if page.endswith((".html", ".md")) else ""
