"""The command line: `capfilt`, also `python -m flows`.

What the user got wrong is answered in one line before a server is started.
"""

from typing import Annotated

import typer

from blip_core.errors import CapfiltError
from blip_core.stores import client_errors
from flows.commands import audit, corpus, cycle, forget, models, platform

app = typer.Typer(
    name="capfilt",
    help="Clean, queryable corpora from noisy web image-text pairs, by BLIP's bootstrapping.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line; an error of ours becomes one line on stderr and its exit status."""
    from flows.run import Interrupted, leave

    try:
        app()
    except CapfiltError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        leave(error.exit_status)
    except client_errors() as error:  # an object store that does not answer any more
        typer.echo(f"error: {' '.join(str(error).split())}; what is done stands, run the same command again", err=True)
        leave(1)
    except Interrupted as interrupted:
        typer.echo(f"{interrupted}: stopped; what is done stands, and the same command goes on from there", err=True)
        leave(128 + interrupted.signum)
    except SystemExit as end:
        leave(end.code)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"capfilt {version('capfilt')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Prints the version.")
    ] = False,
) -> None:
    """Clean, queryable corpora from noisy web image-text pairs, by BLIP's bootstrapping."""


for _commands in (cycle, corpus, audit, forget, models, platform):
    app.add_typer(_commands.app)
