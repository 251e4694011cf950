"""Commands that use models on single files: caption, score, convert."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.commands.shared import show_rows
from flows.options import SOURCES, CaptionerSource, FilterSource, ImageSize, Json, TokenizerOption

app = typer.Typer()


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
    show_rows(rows, json)


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
    show_rows(rows, json)


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
