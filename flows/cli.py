"""The command line: `capfilt`, also `python -m flows`.

Flows and models are imported inside the commands, so that `capfilt --help` answers at once. What the user got
wrong is answered in one line before a server is started.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from blip_core.errors import CapfiltError, ConfigError
from flows.options import (
    SOURCES,
    CaptionerSource,
    ConfigFile,
    FilterSource,
    ImageSize,
    Json,
    RoundOption,
    SeedOption,
    Settings,
    TokenizerOption,
    Verbose,
    WorkspaceOption,
    from_here,
    source_from_here,
)

if TYPE_CHECKING:
    from blip_core.config import BootstrapConfig

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


@app.command()
def demo(
    workspace: Annotated[str, typer.Option(help="The folder to work in.")] = "capfilt-demo",
    seed: Annotated[int, typer.Option(help="Decides the synthetic web and all training.", min=0)] = 0,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The whole cycle on the embedded synthetic web: no data, no network."""
    from blip_core.scenes.web import ScenesConfig
    from flows.run import run_flow

    config = _demo_config(workspace, seed)
    run_flow("demo", config, verbose, scenes=ScenesConfig(seed=seed))
    if json:
        _print_report(config)
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
        loaded = _load(config, settings, {"workspace": workspace, "seed": seed, "round": round})
        from flows.checks import check_inputs
        from flows.run import run_flow

        check_inputs(name, loaded)
        run_flow(name, loaded, verbose)
        if json:
            _print_report(loaded)
        else:
            typer.echo(f"{name}: done in {loaded.workspace}, round {loaded.round}", err=True)

    app.command(name, help=summary)(command)


_flow_command("bootstrap", "The whole cycle on your data: from a URL table to a corpus and a retrained model.")
_flow_command("download", "Fetch the URL table's images into shards.")
_flow_command("pretrain", "Pre-train MED on the shards and the human pairs.")
_flow_command("finetune", "Fine-tune the Captioner and the Filter on the human pairs.")
_flow_command("annotate", "Caption and score the images of every shard.")
_flow_command("publish", "Write the corpus: the candidates that pass the predicate, and the human pairs.")
_flow_command("retrain", "Train a MED on the corpus, and one on the raw web pairs to compare with.")
_flow_command("evaluation", "Measure the trained models on the held-out pairs.")


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
    loaded = _load(config, settings, given)
    if dry_run:
        from flows.plan import plan_clean, print_plan

        typer.echo("checking, and measuring for some 20 s", err=True)
        plan = plan_clean(loaded, price_per_hour)
        _print_json(plan) if json else print_plan(plan)
        return
    from flows.checks import check_inputs
    from flows.run import run_flow
    from flows.summary import clean_numbers, print_clean_summary

    check_inputs("clean", loaded)
    run_flow("clean", loaded, verbose)
    _print_json(clean_numbers(loaded)) if json else print_clean_summary(loaded)


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

    train_here(model, _load(config, settings, {"workspace": workspace, "seed": seed, "round": round}))


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
    _show_rows(rows, json)


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
        _print_json(build_report(opened, number))
    else:
        typer.echo(write_report(opened, number))


@app.command()
def caption(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Pictures: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.")
    ],
    captioner: CaptionerSource,
    candidates: Annotated[int, typer.Option(metavar="K", min=1, max=100, help="Captions for each picture.")] = 1,
    method: Annotated[
        Literal["nucleus", "beam", "greedy"] | None, typer.Option(help="How the next token is chosen.")
    ] = None,
    p: Annotated[float | None, typer.Option("--p", help="nucleus: the probability that is sampled from.")] = None,
    top_k: Annotated[int | None, typer.Option(help="nucleus: the most probable tokens that p sees; 0: all.")] = None,
    temperature: Annotated[float | None, typer.Option(help="nucleus: divides the logits before sampling.")] = None,
    beams: Annotated[int | None, typer.Option(help="beam: how many texts are kept at each step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest caption in tokens, prompt counted.")] = None,
    min_length: Annotated[int | None, typer.Option(help="Shortest caption in tokens, prompt counted.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, tokens that were said become less likely.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Every caption begins with it; left out of the result.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the sampling, with the file's bytes and the number.")] = 0,
    precision: Annotated[
        Literal["fp32", "bf16", "int8"], typer.Option(help="What the models compute in; int8 is for CPUs.")
    ] = "fp32",
    filter: Annotated[str | None, typer.Option(metavar="SRC", help=f"Scores the captions as well: {SOURCES}.")] = None,
    tokenizer: TokenizerOption = None,
    json: Json = False,
) -> None:
    """Captions for images, as `annotate` writes them for the same bytes, seed and settings; with a Filter, scored."""
    from blip_core.config import parse_section
    from blip_core.med.decoding import GenerationConfig
    from flows.caption import caption_images

    given = {
        "method": method,
        "p": p,
        "top_k": top_k,
        "temperature": temperature,
        "beams": beams,
        "max_length": max_length,
        "min_length": min_length,
        "repetition_penalty": repetition_penalty,
        "prompt": prompt,
    }
    generation = parse_section(GenerationConfig, {key: value for key, value in given.items() if value is not None})
    rows = caption_images(images, captioner, generation, candidates, seed, precision, filter, tokenizer)
    _show_rows(rows, json)


@app.command()
def score(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture: JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Texts, each judged by itself.")],
    filter: FilterSource,
    open_with: Annotated[
        Literal["enc", "cls"],
        typer.Option(help="enc: as the Filter was trained; cls: as blip_itm.py and transformers score."),
    ] = "enc",
    image_size: ImageSize = None,
    tokenizer: TokenizerOption = None,
    json: Json = False,
) -> None:
    """ITM and ITC scores of texts for an image: the probability of 'match', and the cosine of the embeddings."""
    from flows.score import score_texts

    rows = score_texts(image, texts, filter, open_with == "enc", image_size, tokenizer)
    _show_rows(rows, json)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help=f"The checkpoint to read: {SOURCES}.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; for release, the file.")],
    to: Annotated[
        Literal["capfilt", "transformers", "release"],
        typer.Option(help="capfilt: this project's; transformers: a BLIP for from_pretrained; release: a .pth file."),
    ],
    kind: Annotated[
        Literal["captioner", "filter"] | None,
        typer.Option(help="Which of the two to write, where the checkpoint is of a model that can be both."),
    ] = None,
    tokenizer: TokenizerOption = None,
    image_size: ImageSize = None,
) -> None:
    """Checkpoints from one format to another: this project's, transformers' and the original release's."""
    from flows.convert import convert_checkpoint

    typer.echo(convert_checkpoint(source, target, to, kind, tokenizer, image_size))


def _load(path: Path, settings: list[str] | None, overrides: dict[str, Any]) -> "BootstrapConfig":
    """The configuration with --set's keys replaced, and then those of `overrides` that are not None."""
    from blip_core.config import load_config

    given: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: must be KEY=VALUE, such as pretrain.steps=500")
        given[key] = value
    # The texts of --set are YAML; those of the other options are meant as they stand, and JSON is YAML.
    given |= {key: json.dumps(value) for key, value in overrides.items() if value is not None}
    return load_config(path, given)


def _demo_config(workspace: str, seed: int) -> "BootstrapConfig":
    """The demo's settings, with its tables below the workspace."""
    from blip_core import scenes
    from blip_core.config import load_config

    tables = Path(workspace).expanduser().resolve() / "scenes"
    given = {
        "workspace": json.dumps(workspace),
        "seed": seed,
        "web": {"path": str(tables / "urls.parquet"), "caption": "alt", "uid": "uid"},
        "human": {"path": str(tables / "human.parquet"), "uid": "uid"},
        "held_out": {"path": str(tables / "held_out.parquet"), "uid": "uid"},
        "truth": json.dumps(str(tables / "truth.parquet")),
    }
    return load_config(Path(scenes.__file__).with_name("demo.yaml"), given)


def _print_report(config: "BootstrapConfig") -> None:
    from blip_core.evaluation.report import build_report
    from blip_core.workspace import Workspace

    _print_json(build_report(Workspace.existing(config.workspace), config.round))


def _show_rows(rows: Any, json: bool) -> None:
    from flows.tables import print_rows, to_json

    if json:
        typer.echo(to_json(rows))
    else:
        print_rows(rows)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
