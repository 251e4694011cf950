"""Commands that run the cycle or one of its steps: demo, bootstrap, clean, download, pretrain and so on."""

from pathlib import Path
from typing import Annotated

import typer

from blip_core.errors import ConfigError, RoundRejected
from flows.commands.shared import load, print_json, print_report
from flows.options import (
    SOURCES,
    ConfigFile,
    Json,
    RoundOption,
    SeedOption,
    Settings,
    Verbose,
    WorkspaceOption,
    from_here,
    source_from_here,
)

app = typer.Typer()


@app.command()
def demo(
    workspace: Annotated[str, typer.Option(help="The folder to work in.")] = "capfilt-demo",
    seed: Annotated[int, typer.Option(help="Decides the synthetic web and all training.", min=0)] = 0,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The whole cycle on the embedded synthetic web: no data, no network."""
    from blip_core.scenes.web import ScenesConfig
    from flows.presets import demo_config
    from flows.run import run_flow

    config = demo_config(workspace, seed)
    run_flow("demo", config, verbose, scenes=ScenesConfig(seed=seed))
    if json:
        print_report(config)
    else:
        from flows.summary import print_summary

        print_summary(config)


def _flow_command(name: str, summary: str) -> None:
    """Adds the command that runs one flow of a configuration."""

    def command(
        config: ConfigFile,
        workspace: WorkspaceOption = None,
        seed: SeedOption = None,
        round: RoundOption = None,
        settings: Settings = None,
        json: Json = False,
        verbose: Verbose = False,
    ) -> None:
        _run(name, config, workspace, seed, round, settings, json, verbose)

    app.command(name, help=summary)(command)


def _run(
    name: str,
    config: Path,
    workspace: str | None,
    seed: int | None,
    round: int | None,
    settings: list[str] | None,
    json: bool,
    verbose: bool,
    **parameters: object,
) -> None:
    """Runs one flow of a configuration, with further parameters."""
    loaded = load(config, settings, {"workspace": workspace, "seed": seed, "round": round})
    from flows.checks import check_inputs
    from flows.run import run_flow

    check_inputs(name, loaded)
    run_flow(name, loaded, verbose, **parameters)
    if json:
        print_report(loaded)
    else:
        typer.echo(f"{name}: done in {loaded.workspace}, round {loaded.round}", err=True)


_flow_command("bootstrap", "The whole cycle on your data: from a URL table to a corpus and a retrained model.")
_flow_command("pretrain", "Pre-train MED on the shards and the human pairs.")
_flow_command("finetune", "Fine-tune the Captioner and the Filter on the human pairs.")
_flow_command("annotate", "Caption and score the images of every shard.")
_flow_command("publish", "Write the corpus: the candidates that pass the predicate, and the human pairs.")
_flow_command("retrain", "Train a MED on the corpus, and one on the raw web pairs to compare with.")
_flow_command("evaluation", "Measure the trained models on the held-out pairs.")


@app.command()
def download(
    config: ConfigFile,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Only tries again what failed in the shards for a reason that may pass."),
    ] = False,
    workspace: WorkspaceOption = None,
    seed: SeedOption = None,
    round: RoundOption = None,
    settings: Settings = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Fetch the URL table's images into shards."""
    _run("download", config, workspace, seed, round, settings, json, verbose, retry_failed=retry_failed)


@app.command()
def clean(
    config: ConfigFile,
    urls: Annotated[
        str | None, typer.Option(metavar="TABLE", help="Overrides web.path: a file, from the current folder, or a URL.")
    ] = None,
    workspace: WorkspaceOption = None,
    captioner: Annotated[
        str | None, typer.Option(metavar="SRC", help=f"Overrides checkpoints.captioner: {SOURCES}.")
    ] = None,
    filter: Annotated[str | None, typer.Option(metavar="SRC", help=f"Overrides checkpoints.filter: {SOURCES}.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="SRC", help="Overrides checkpoints.tokenizer, that of .pth files.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="A trial: exactly the first N rows, in the order of uid.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Checks, plans and measures for some 20 s; writes and fetches nothing.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="With --dry-run: this machine's, for the cost of it all.")
    ] = None,
    seed: SeedOption = None,
    round: RoundOption = None,
    settings: Settings = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Download, annotate and publish with a given Captioner and Filter; no training."""
    if price_per_hour is not None and not dry_run:
        raise ConfigError("--price-per-hour: is for --dry-run, which measures how long the work takes")
    models = {"captioner": captioner, "filter": filter, "tokenizer": tokenizer}
    given = {"web.path": from_here(urls), "web.limit": limit, "workspace": workspace, "seed": seed, "round": round}
    given |= {f"checkpoints.{name}": source_from_here(source) for name, source in models.items()}
    loaded = load(config, settings, given)
    if dry_run:
        from flows.plan import plan_clean, print_plan

        typer.echo("checking, and measuring for some 20 s", err=True)
        plan = plan_clean(loaded, price_per_hour)
        print_json(plan) if json else print_plan(plan)
        return
    from flows.checks import check_inputs
    from flows.run import run_flow
    from flows.summary import clean_numbers, print_clean_summary

    check_inputs("clean", loaded)
    run_flow("clean", loaded, verbose)
    print_json(clean_numbers(loaded)) if json else print_clean_summary(loaded)


@app.command("re-bootstrap")
def re_bootstrap(
    config: ConfigFile,
    workspace: WorkspaceOption = None,
    seed: SeedOption = None,
    settings: Settings = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """A new round from what is new on the web, promoted when it is no worse; the first one where nothing stands."""
    loaded = load(config, settings, {"workspace": workspace, "seed": seed})
    from blip_core.workspace import Workspace
    from flows.checks import check_inputs
    from flows.commands.corpus import print_rounds
    from flows.run import run_flow

    check_inputs("re-bootstrap", loaded)
    try:
        run_flow("re_bootstrap", loaded, verbose)
    except RoundRejected:
        print_rounds(Workspace.existing(loaded.workspace), json)
        raise
    print_rounds(Workspace.existing(loaded.workspace), json)


@app.command()
def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="med, captioner, filter, retrained or retrained-raw.")],
    config: ConfigFile,
    workspace: WorkspaceOption = None,
    seed: SeedOption = None,
    round: RoundOption = None,
    settings: Settings = None,
) -> None:
    """One training without Prefect: what each process of `accelerate launch` or torchrun runs."""
    from flows.launched import train_here

    train_here(model, load(config, settings, {"workspace": workspace, "seed": seed, "round": round}))
