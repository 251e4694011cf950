"""Options that several commands of the command line have in common, and how their values are read."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration (docs/configuration.md).")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides one key, such as pretrain.steps=500; may be repeated."),
]
WorkspaceOption = Annotated[str | None, typer.Option("--workspace", help="Overrides the configured workspace.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Overrides the configured seed.")]
RoundOption = Annotated[int | None, typer.Option("--round", help="Overrides the configured round.")]
SOURCES = "a folder of this project or of transformers, a .pth file of the original release, or a name on the hub"
CaptionerSource = Annotated[
    str, typer.Option("--captioner", metavar="SRC", help=f"The Captioner's checkpoint: {SOURCES}.")
]
FilterSource = Annotated[str, typer.Option("--filter", metavar="SRC", help=f"The Filter's checkpoint: {SOURCES}.")]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", min=1, help="Side of the images in pixels; positions are interpolated.")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="SRC", help="Replaces the checkpoint's; .pth files have bert-base-uncased."),
]
Json = Annotated[bool, typer.Option("--json", help="Prints one JSON value on stdout, and everything else on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Prints Prefect's log as well.")]


def from_here(path: str | None) -> str | None:
    """A table named on the command line: a relative path begins at the current folder; a URL stays as it is."""
    return path if path is None or "://" in path else str(Path(path).expanduser().absolute())


def source_from_here(source: str | None) -> str | None:
    """A checkpoint or tokenizer named on the command line: a path where there is such a thing, else a name."""
    return from_here(source) if source is not None and Path(source).expanduser().exists() else source
