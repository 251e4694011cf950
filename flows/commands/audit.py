"""The command by which a person judges a sample of a round."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from blip_core.errors import ConfigError
from flows.commands.shared import print_json, show_rows
from flows.options import Json

if TYPE_CHECKING:
    from blip_core.workspace import Workspace

app = typer.Typer()


@app.command()
def audit(
    workspace: Annotated[str, typer.Option("--workspace", help="The workspace.")] = ".",
    round: Annotated[int | None, typer.Option("--round", help="The round; the last one if not given.")] = None,
    pairs: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Pairs to draw, half of them kept ones; 400 if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed draws other pairs; 0 if not given.")] = None,
    answers: Annotated[
        str | None, typer.Option(metavar="FILE", help="The answers that the page gave: estimates from them.")
    ] = None,
    json: Json = False,
) -> None:
    """A page on which a person marks a random sample's pairs; with --answers, noise, precision and recall from them."""
    from blip_core.workspace import Workspace

    opened = Workspace.existing(workspace)
    if answers is not None:
        if pairs is not None or seed is not None:
            raise ConfigError("--answers: the file says which pairs and seed it is of; leave out --pairs and --seed")
        _estimate(opened, answers, round, json)
    else:
        _draw(opened, round, pairs, seed, json)


def _draw(workspace: "Workspace", round: int | None, pairs: int | None, seed: int | None, json: bool) -> None:
    from blip_core.evaluation.audit_page import write_page
    from blip_core.evaluation.sample import PAIRS, draw_sample

    number = round if round is not None else max(workspace.round_numbers(), default=1)
    sample = draw_sample(workspace, number, PAIRS if pairs is None else pairs, seed or 0)
    page = write_page(workspace, sample)
    if json:
        print_json({"page": str(page), "sample": sample.name, "round": number, "drawn": len(sample.drawn)})
    else:
        typer.echo(page)
        typer.echo(
            "audit: open it in a browser, mark, download the answers; then capfilt audit --answers FILE", err=True
        )


def _estimate(workspace: "Workspace", answers: str, round: int | None, json: bool) -> None:
    from blip_core.evaluation.answers import audit_answers
    from blip_core.stores import located

    found = audit_answers(workspace, located(answers), round)
    if json:
        print_json(found)
        return
    show_rows(_table(found), json=False)
    marked = found["right"] + found["wrong"] + found["unsure"]
    typer.echo(f"round {found['round']}: {marked} of {found['drawn']} pairs marked, {found['unsure']} of them unsure")
    typer.echo(f"audit: {workspace.round(found['round']).audit}", err=True)


def _table(found: dict[str, Any]) -> Any:
    """A row a measure, a column a source, as an Arrow table."""
    import pyarrow as pa

    from blip_core.evaluation.estimates import MEASURES

    columns = {source: [_cell(numbers[name]) for name in MEASURES] for source, numbers in found["estimates"].items()}
    return pa.table({"%, 95% interval": [name.replace("_", " ") for name in MEASURES], **columns})


def _cell(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return "unknown"
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"
