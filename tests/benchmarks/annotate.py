"""The speed of annotation: ours against what a user would write on transformers' BLIP, `make annotate`.

Both caption every image once and judge two texts of it, from the same weights, in one process, by turns. Ours reads
JPEGs from Parquet shards, decodes them and writes parts; transformers' models get images that are ready to use. All
captions have the same number of tokens. First both are shown to judge alike, and how often int8 decides as fp32 does;
for that, the ITM head is shifted until half of the candidates match, which is where deciding is hardest.
"""

import argparse
import io
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import every_word, machine, matmul_rate, now
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging
from transformers_annotate import TransformersAnnotation

from blip_core.capfilt.annotate import ShardJob, annotate_shards
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig, FailedShard
from blip_core.data.decoding import decode
from blip_core.data.shards import SHARD_SCHEMA, write_shard
from blip_core.data.transforms import normalise
from blip_core.med.architecture import PRESETS, Architecture
from blip_core.med.checkpoint import LoadedMED, load_med
from blip_core.med.convert import write_transformers
from blip_core.med.decoding import GenerationConfig
from blip_core.med.inference import Precision
from blip_core.med.med import build_med
from blip_core.med.tokenizer import Tokenizer
from blip_core.workspace import Round

SEED = 0
VOCABULARY = 30522  # BERT's
WEB_WORDS = (5, 14)  # words of a web text, from and to
PICTURE = (512, 384)  # as downloaded with the default settings
TOLERANCE = 1e-3  # of a probability; what lies nearer to the threshold may be decided either way
TOP_K = 50  # transformers' default
SECONDS_OF_REST = 1.0  # after ours, whose workers make the next pictures ahead


class Candidates(NamedTuple):
    """For each judged image its web text and its caption, and ours' scores of both (B, 2), half of them above 0.5."""

    texts: list[tuple[str, str]]
    scores: Tensor


class Sides(NamedTuple):
    """The models of one image size, in every way in which they are used."""

    theirs: TransformersAnnotation
    ours: dict[Precision, tuple[Captioner, Filter]]
    flops: float  # of ours, for one image


@dataclass
class Timings:
    """Seconds an image of every side, those of ours that were spent waiting, and the peak memory after each turn."""

    seconds: dict[str, list[float]]
    waited: dict[str, list[float]]
    memory_mb: list[float]
    peak: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 where the two sides do not decide alike."""
    options = _options(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    figures: dict[str, Any] = {}
    for size in options.image_sizes:
        with TemporaryDirectory(prefix="capfilt-bench-") as folder:
            for name, value in _benchmark(Path(folder), size, options).items():
                figures.setdefault(name, {})[str(size)] = value
    figures |= _setting(options)
    sys.stdout.write(json.dumps(figures) + "\n" if options.json else _table(figures))
    apart = {size: share for size, share in figures["same_decisions"].items() if share < 1}
    if apart:
        sys.stderr.write(f"failed: ours and transformers' do not decide alike: {apart}\n")
    return 1 if apart else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="base", help="the models' sizes")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[224, 384], help="sides of the images")
    parser.add_argument("--images", type=int, default=8192 if on_gpu else 64, help="images in a shard, ours")
    parser.add_argument("--their-images", type=int, default=1024 if on_gpu else 16, help="of these, transformers'")
    parser.add_argument("--batch", type=int, help="images at once, ours; default: the Annotator's")
    parser.add_argument("--their-batch", type=int, default=64 if on_gpu else 8, help="images at once, transformers'")
    parser.add_argument("--judged", type=int, default=256, help="images whose texts int8 and fp32 are compared on")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of every caption")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns of each side; the median counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu", help="on cuda: bf16")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    options.precision = "bf16" if options.device.type == "cuda" else "fp32"
    options.precisions = ["bf16"] if options.device.type == "cuda" else ["fp32", "int8"]
    options.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    return options


def _benchmark(folder: Path, image_size: int, options: argparse.Namespace) -> dict[str, Any]:
    judged = _shard(folder / "judged.parquet", options.judged, SEED)
    candidates = _write_models(folder, replace(PRESETS[options.preset], image_size=image_size), judged, options)
    sides = _sides(folder, options)
    agreement = _agreement(judged, candidates, sides, options)
    shards = [_shard(folder / f"{turn}.parquet", options.images, 1 + turn) for turn in range(1 + options.repeats)]
    return {**_figures(_measure(folder, shards, sides, options), sides.flops, options), **agreement}


def _figures(timings: Timings, flops: float, options: argparse.Namespace) -> dict[str, Any]:
    seconds = {side: statistics.median(found) for side, found in timings.seconds.items()}
    ours, theirs = seconds[options.precision], seconds["transformers"]
    waited = {side: sum(timings.waited[side]) / sum(timings.seconds[side]) for side in timings.waited}
    return {
        "ratio": round(theirs / ours, 3),
        **({"int8_ratio": round(theirs / seconds["int8"], 3)} if "int8" in seconds else {}),
        "matmul_share": round(flops / (ours * timings.peak), 3),
        "images_per_second": {side: round(1 / found, 2) for side, found in seconds.items()},
        "waiting_share": {side: round(share, 4) for side, share in waited.items()},
        "image_tflop": round(flops / 1e12, 4),
        "matmul_peak_tflops": round(timings.peak / 1e12, 4),
        "peak_memory_mb": round(timings.memory_mb[-1]),
        "peak_memory_growth_mb": round(timings.memory_mb[-1] - timings.memory_mb[0]),
    }


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "preset": options.preset,
        "batch": options.batch,
        "their_batch": options.their_batch,
        "tokens": options.tokens,
        "precision": options.precision,
        "repeats": options.repeats,
        **machine(options.device),
    }


def _shard(path: Path, images: int, seed: int) -> Path:
    """A shard of pictures with the spectrum of photographs, and web texts of several lengths."""
    chance = np.random.default_rng(seed)
    words = " ".join(every_word()).split()
    rows = [
        {
            "uid": f"{number:08}",
            "url": f"http://example.com/{number}",
            "caption": " ".join(chance.choice(words, chance.integers(*WEB_WORDS, endpoint=True))),
            "status": "ok",
            "sha256": f"{seed:032x}{number:032x}",
            "image": _picture(chance),
        }
        for number in range(images)
    ]
    table = pa.Table.from_pylist(rows, SHARD_SCHEMA)
    write_shard(path, (table.slice(start, 1000) for start in range(0, images, 1000)), "benchmark", images)
    return path


def _picture(chance: np.random.Generator) -> bytes:
    width, height = PICTURE
    layers = [
        Image.fromarray(chance.integers(0, 256, (height // grain, width // grain, 3), dtype=np.uint8)).resize(PICTURE)
        for grain in (64, 16, 4)
    ]
    mixed = Image.blend(Image.blend(layers[0], layers[1], 0.35), layers[2], 0.15)
    buffer = io.BytesIO()
    mixed.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_models(folder: Path, architecture: Architecture, judged: Path, options: argparse.Namespace) -> Candidates:
    """Writes a Captioner and a Filter in transformers' format; of the judged candidates, half match."""
    torch.manual_seed(SEED)
    words = Tokenizer.train(every_word(), VOCABULARY, max_tokens=35)
    med = build_med(architecture, len(words), words.encode_id, words.decode_id)
    loaded = LoadedMED(med.eval(), words, "", architecture, {})
    write_transformers(folder / "captioner", loaded, "captioner")
    write_transformers(folder / "filter", loaded, "filter")
    part = _annotate(judged, folder / "judged", _load(folder, options, options.precision), options)
    margins = torch.tensor(part["itm_score"].to_pylist(), dtype=torch.float64).logit()
    with torch.no_grad():
        med.itm_head.bias[1] -= margins.median().float()
    write_transformers(folder / "filter", loaded, "filter")
    texts = part["text"].to_pylist()
    return Candidates(
        list(zip(texts[::2], texts[1::2], strict=True)), (margins - margins.median()).sigmoid().view(-1, 2)
    )


def _load(folder: Path, options: argparse.Namespace, precision: Precision) -> tuple[Captioner, Filter]:
    compiled = options.device.type == "cuda"
    return (
        Captioner.load(folder / "captioner", options.device, precision, compile=compiled),
        Filter.load(folder / "filter", options.device, precision=precision, compile=compiled),
    )


def _sides(folder: Path, options: argparse.Namespace) -> Sides:
    ours = {precision: _load(folder, options, precision) for precision in options.precisions}
    encode_id = ours[options.precision][1].tokenizer.encode_id
    theirs = TransformersAnnotation(folder / "captioner", folder / "filter", options.device, options.dtype, encode_id)
    return Sides(theirs, ours, _flops(folder, options))


def _flops(folder: Path, options: argparse.Namespace) -> float:
    """Floating-point operations of the matrix products for one image, attention's among them, fused or not."""
    captioning, judging = load_med(folder / "captioner"), load_med(folder / "filter")
    captioner = Captioner(captioning.med, captioning.tokenizer, "")
    filter = Filter(judging.med, judging.tokenizer, "")
    some = 4
    rows = pq.read_table(_shard(folder / "counted.parquet", some, SEED)).to_pylist()
    images = normalise(
        decode([row["image"] for row in rows], [captioning.med.image_size]).pixels[captioning.med.image_size]
    )
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        captions = captioner.caption(images, _generation(options), [[number] for number in range(some)])
        filter.score(images, [[row["caption"], text] for row, [(text, _)] in zip(rows, captions, strict=True)])
    return counter.get_total_flops() / some


def _generation(options: argparse.Namespace) -> GenerationConfig:
    return GenerationConfig(p=0.9, top_k=TOP_K, max_length=options.tokens, min_length=options.tokens)


def _stream(
    jobs: list[ShardJob], models: tuple[Captioner, Filter], precision: Precision, options: argparse.Namespace
) -> Iterator[Any]:
    config = AnnotateConfig(batch_size=options.batch, precision=precision, compile=options.device.type == "cuda")
    return annotate_shards(jobs, *models, config, _generation(options), SEED)


def _annotate(shard: Path, target: Path, models: tuple[Captioner, Filter], options: argparse.Namespace) -> pa.Table:
    for result in _stream([ShardJob(shard, target)], models, options.precision, options):
        if isinstance(result, FailedShard):
            raise result.error
    return pq.read_table(target)


def _agreement(judged: Path, candidates: Candidates, sides: Sides, options: argparse.Namespace) -> dict[str, Any]:
    """How often others decide as ours does in its first precision, on the same candidates."""
    texts, own = candidates
    images = list(_batches(judged, options))
    few = options.their_images
    web, synthetic = ([row[place] for row in texts[:few]] for place in (0, 1))
    theirs = torch.tensor([_their_scores(images, some, sides.theirs) for some in (web, synthetic)]).T
    clear = (own[:few] - 0.5).abs() > TOLERANCE
    found = {
        "same_decisions": _share(((theirs > 0.5) == (own[:few] > 0.5))[clear]),
        "score_difference": round((theirs - own[:few]).abs().max().item(), 6),
    }
    if "int8" in sides.ours:
        rough = torch.tensor(list(_int8_scores(images, texts, sides.ours["int8"][1])))
        found["int8_agreement"] = _share((rough > 0.5) == (own > 0.5))
    return found


def _share(right: Tensor) -> float:
    return round(right.float().mean().item(), 4)


def _batches(shard: Path, options: argparse.Namespace) -> Iterator[Tensor]:
    size = _image_size(shard.parent)
    for rows in pq.ParquetFile(shard).iter_batches(options.their_batch, columns=["image"]):
        yield normalise(decode(rows["image"].to_pylist(), [size]).pixels[size])


def _image_size(folder: Path) -> int:
    return json.loads((folder / "captioner" / "config.json").read_text())["vision_config"]["image_size"]


def _their_scores(images: list[Tensor], texts: list[str], theirs: TransformersAnnotation) -> list[float]:
    left = list(texts)
    found: list[float] = []
    for some in images:
        if left:
            found += theirs.score(some[: len(left)], left[: len(some)])
            left = left[len(some) :]
    return found


def _int8_scores(images: list[Tensor], texts: list[tuple[str, str]], filter: Filter) -> Iterator[list[float]]:
    left = iter(texts)
    for some in images:
        for scores in filter.score(some, [next(left) for _ in some]):
            yield [score.itm for score in scores]


def _measure(folder: Path, shards: list[Path], sides: Sides, options: argparse.Namespace) -> Timings:
    """All sides by turns, one shard a turn; the first one warms up and does not count."""
    streams = {
        precision: _stream(
            [ShardJob.of(Round(0, folder / precision), shard) for shard in shards], models, precision, options
        )
        for precision, models in sides.ours.items()
    }
    timings = Timings({side: [] for side in ("transformers", *streams)}, {side: [] for side in streams}, [])
    for turn, shard in enumerate(shards):
        found = {side: _our_turn(stream, options) for side, stream in streams.items()}
        time.sleep(SECONDS_OF_REST)
        their_seconds = _their_turn(shard, sides.theirs, options)
        timings.peak = max(timings.peak, matmul_rate(options.device, options.dtype))
        timings.memory_mb.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if turn:
            timings.seconds["transformers"].append(their_seconds)
            for side, (seconds, waited) in found.items():
                timings.seconds[side].append(seconds)
                timings.waited[side].append(waited)
    return timings


def _our_turn(stream: Iterator[Any], options: argparse.Namespace) -> tuple[float, float]:
    """Seconds an image, and those of them spent waiting for pictures."""
    began = now(options.device)
    result = next(stream)
    if isinstance(result, FailedShard):
        raise result.error
    return (now(options.device) - began) / options.images, result.waited / options.images


def _their_turn(shard: Path, theirs: TransformersAnnotation, options: argparse.Namespace) -> float:
    """Seconds an image."""
    rows = pq.read_table(shard, columns=["caption"])["caption"].to_pylist()[: options.their_images]
    batches = []
    for images in _batches(shard, options):
        if taken := rows[: len(images)]:
            batches.append((images[: len(taken)], taken))
            rows = rows[len(taken) :]
    began = now(options.device)
    for images, texts in batches:
        theirs.annotate(images, texts, options.tokens)
    return (now(options.device) - began) / options.their_images


def _table(figures: dict[str, Any]) -> str:
    return "".join(f"{name:>22}  {value}\n" for name, value in figures.items())


if __name__ == "__main__":
    sys.exit(main())
