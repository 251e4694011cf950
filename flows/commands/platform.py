"""Commands for a Prefect server that stays: setup-prefect."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.commands.shared import show_rows
from flows.options import Json

app = typer.Typer()


@app.command("setup-prefect")
def setup_prefect(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG.yaml]",
            envvar="CAPFILT_CONFIG",
            help="The configuration that runs begin with in the UI and on schedule; without it, presets.",
        ),
    ] = None,
    type: Annotated[
        Literal["process", "kubernetes"],
        typer.Option(help="Where workers start runs: as processes beside them, or as Kubernetes jobs."),
    ] = "process",
    gpus: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Runs at a time in pool gpu; at first the GPUs of this machine, or 1."),
    ] = None,
    cpu_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Runs at a time in pool cpu; at first 4.")
    ] = None,
    deploy: Annotated[bool, typer.Option(help="Deploys prefect.yaml, every flow, as well.")] = True,
    json: Json = False,
) -> None:
    """Work pools, queues, limits, automations and deployments at the server of PREFECT_API_URL; safe to run twice."""
    from flows.server import set_environment

    set_environment(verbose=False)
    import pyarrow as pa

    from flows.setup_prefect import setup_prefect as set_up

    parts = set_up(type, gpus, cpu_limit, deploy, config)
    show_rows(pa.Table.from_pylist([asdict(part) for part in parts]), json)
