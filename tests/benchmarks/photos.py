"""The whole cycle on real photographs: `make photos`.

Photographs with human captions and with the alt texts of real pages are served on loopback HTTP, and one round of
bootstrapping runs over them, with the settings of deployments/presets/photos.yaml. Nothing may be lost on the way,
and on held-out photographs the Filter has to rank right texts above mismatched ones better than chance.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from blip_core.capfilt.filter import Filter
from blip_core.config import BootstrapConfig, load_config
from blip_core.corpus.query import run_query
from blip_core.corpus.schemas import CORPUS_VERSION, EMPTY_TEXT
from blip_core.corpus.selection import KEPT_KEY, REJECTED_KEY
from blip_core.data.images import decode_image
from blip_core.data.shards import check_part
from blip_core.data.tables import PairTable, iterate_pairs
from blip_core.data.transforms import eval_transform
from blip_core.errors import CapfiltError, InputError, WorkspaceError
from blip_core.evaluation.audit import AUC, auc
from blip_core.evaluation.report import build_report
from blip_core.files import atomic_folder, fingerprint, read_json, write_json
from blip_core.scenes.server import serve_scenes
from blip_core.scenes.web import PAIR_SCHEMA, ROW_SCHEMA, TRUTH_SCHEMA, ScenesPaths, url_table
from blip_core.workspace import Workspace
from flows.checks import check_inputs
from flows.run import Interrupted, leave, run_flow
from flows.tables import print_rows

ROOT = Path(__file__).resolve().parents[2]
PRESET = ROOT / "deployments" / "presets" / "photos.yaml"
MANIFEST = "photos.json"
MISMATCHED = 0.4  # share of the captioned web photographs that get another one's caption
SEED = 0  # decides which photographs and texts are used; the configuration's seed decides the training
BATCH = 64
QUERY = """
SELECT source, count(*) AS candidates, count(*) FILTER (itm_score > 0.5) AS above_half,
    round(avg(itm_score), 3) AS mean_itm_score, arg_max(text, itm_score) AS best_text
FROM annotations GROUP BY source ORDER BY source"""


class Photograph(NamedTuple):
    """One photograph and its texts."""

    name: str
    image: bytes
    texts: list[str]


class Sizes(NamedTuple):
    """How many photographs are used: with captions as web, as human pairs, and held out."""

    web: int
    human: int
    held_out: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = _options(arguments)
    missing = [name for name in ("captions", "webalt") if not list((options.data / name).glob("*.parquet"))]
    if missing:
        _say(f"skipped: no photographs in {options.data / missing[0]}; --data names their folder")
        return 0
    try:
        return _benchmark(options)
    except CapfiltError as error:
        _say(f"error: {' '.join(str(error).split())}", sys.stderr)
        return error.exit_status
    except Interrupted as interrupted:
        _say(f"{interrupted}: stopped; the same command goes on from there", sys.stderr)
        return 128 + interrupted.signum


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One round of bootstrapping on real photographs.")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the photographs")
    parser.add_argument("--workspace", default="capfilt-photos", help="the folder to work in")
    parser.add_argument("--json", action="store_true", help="print one JSON value, and everything else on stderr")
    override = "overrides one key of the configuration, such as pretrain.steps=50; may be repeated"
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], type=_setting, dest="settings", help=override
    )
    parser.add_argument("--web", type=_count, default=2500, help="captioned photographs that are served")
    parser.add_argument("--human", type=_count, default=1500, help="photographs of the human pairs")
    parser.add_argument("--held-out", type=_count, default=300, help="photographs that are held out")
    return parser.parse_args(arguments)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY=VALUE, such as pretrain.steps=50")
    return key, value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 2 on")
    return int(text)


def _benchmark(options: argparse.Namespace) -> int:
    began = time.monotonic()
    sizes = Sizes(options.web, options.human, options.held_out)
    workspace = Workspace.open(options.workspace)
    photos = make_photos(options.data, workspace.root / "photos", sizes)
    config = _configure(workspace, photos, dict(options.settings))
    with serve_scenes(photos.folder) as address:
        url_table(photos, address, Path(config.web.path))
        check_inputs("bootstrap", config)
        run_flow("bootstrap", config, verbose=False)
    figures, problems = _measure(workspace, config, photos)
    figures |= {"total_seconds": round(time.monotonic() - began, 1), "problems": problems}
    answer = run_query(workspace, QUERY)
    if options.json:
        _say(json.dumps({**figures, "query": answer.to_pylist()}, indent=2, ensure_ascii=False))
    else:
        _show(figures, answer, workspace.round(config.round).report)
    for problem in problems:
        _say(f"failed: {problem}", sys.stderr)
    return int(bool(problems))


def make_photos(data: Path, folder: Path, sizes: Sizes) -> ScenesPaths:
    """Writes pictures and tables in the layout of the synthetic web's; does nothing where they stand.

    Raises InputError where there are too few photographs, and WorkspaceError where another choice of them stands.
    """
    paths = ScenesPaths(folder, folder / "human.parquet", folder / "held_out.parquet", folder / "truth.parquet")
    manifest = {**sizes._asdict(), "mismatched": MISMATCHED, "seed": SEED}
    if (folder / MANIFEST).exists():
        if (standing := read_json(folder / MANIFEST)) == manifest:
            return paths
        raise WorkspaceError(f"{folder}: holds another choice of photographs, {standing}; name a new --workspace")
    rng = np.random.default_rng(SEED)
    training = _choose(data / "captions", "train", sizes.web + sizes.human, "--web and --human", rng)
    held_out = _choose(data / "captions", "dev", sizes.held_out, "--held-out", rng)
    with atomic_folder(folder) as temporary:
        _write_web(temporary, training[: sizes.web], _found(data / "webalt"), rng)
        _write_pairs(temporary / paths.human.name, training[sizes.web :])
        _write_pairs(temporary / paths.held_out.name, held_out)
        write_json(temporary / MANIFEST, manifest)
    return paths


def _choose(folder: Path, split: str, count: int, options: str, rng: np.random.Generator) -> list[Photograph]:
    """`count` captioned photographs of a split, in random order."""
    rows = ds.dataset(folder).to_table(columns=["image_id", "image", "captions"], filter=ds.field("split") == split)
    if count > len(rows):
        raise InputError(f"{options}: {count} photographs; {folder} has {len(rows)} in the split '{split}'")
    chosen = rng.permutation(len(rows))[:count]
    return [
        Photograph(fingerprint("captions", row["image_id"]), row["image"], row["captions"])
        for row in rows.sort_by("image_id").take(chosen).to_pylist()
    ]


def _found(folder: Path) -> list[Photograph]:
    """The photographs of real pages with their alt texts."""
    rows = ds.dataset(folder).to_table(columns=["image_id", "image", "alt"]).to_pylist()
    return [Photograph(fingerprint("webalt", row["image_id"]), row["image"], [row["alt"]]) for row in rows]


def _write_web(folder: Path, captioned: list[Photograph], found: list[Photograph], rng: np.random.Generator) -> None:
    """Pictures, web pairs, and the truth of those that have one."""
    (folder / "images").mkdir()
    for photograph in [*captioned, *found]:
        (folder / "images" / f"{photograph.name}.jpg").write_bytes(photograph.image)
    mismatched = set(rng.permutation(len(captioned))[: round(MISMATCHED * len(captioned))].tolist())
    texts = [
        _draw(captioned[_other(index, len(captioned), rng) if index in mismatched else index].texts, rng)
        for index in range(len(captioned))
    ]
    kinds = ["mismatched" if index in mismatched else "right" for index in range(len(captioned))]
    texts += [photograph.texts[0] for photograph in found]
    names = [photograph.name for photograph in [*captioned, *found]]
    pictures = [f"images/{name}.jpg" for name in names]
    _write(folder / "rows.parquet", ROW_SCHEMA, [names, pictures, texts])
    _write(folder / "truth.parquet", TRUTH_SCHEMA, [names[: len(kinds)], kinds, [None] * len(kinds)])


def _write_pairs(path: Path, photographs: list[Photograph]) -> None:
    _write(path, PAIR_SCHEMA, [list(column) for column in zip(*photographs, strict=True)])


def _write(path: Path, schema: pa.Schema, columns: list[list[Any]]) -> None:
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    pq.write_table(pa.table(arrays, schema=schema), path, compression="zstd")


def _draw(texts: list[str], rng: np.random.Generator) -> str:
    return texts[rng.integers(len(texts))]


def _other(index: int, count: int, rng: np.random.Generator) -> int:
    """Any of `count` places but this one."""
    return (index + int(rng.integers(1, count))) % count


def _configure(workspace: Workspace, photos: ScenesPaths, settings: dict[str, str]) -> BootstrapConfig:
    tables = {
        "workspace": json.dumps(str(workspace.root)),
        "web": {"path": str(photos.folder / "urls.parquet"), "caption": "alt", "uid": "uid"},
        "human": {"path": str(photos.human), "uid": "uid"},
        "held_out": {"path": str(photos.held_out), "uid": "uid"},
        "truth": json.dumps(str(photos.truth)),
        "download.allow_private_networks": "true",
    }
    return load_config(PRESET, {**tables, **settings})


def _measure(workspace: Workspace, config: BootstrapConfig, photos: ScenesPaths) -> tuple[dict[str, Any], list[str]]:
    """The figures of a round, and what is wrong with it."""
    report = build_report(workspace, config.round)
    kept, rejected = _published(workspace, config.round)
    held_out = held_out_auc(workspace.round(config.round).filter, PairTable(str(photos.held_out), uid="uid"))
    figures = {
        "rows": pq.read_metadata(photos.rows).num_rows,
        "download": report["download"],
        "candidates": report["candidates"],
        "unscored": report["unscored"],
        "kept": kept,
        "rejected": rejected,
        "by_source": report["by_source"],
        "held_out_auc": held_out._asdict(),
        "web_auc": {"value": report["filter_auc"], "interval": report["filter_auc_interval"]},
        "web_noise": report["web_noise"],
        "retrieval": report["retrieval"],
        "captioning": report["captioning"],
        "seconds": report["seconds"],
    }
    problems = list(_losses(figures, 1 + config.annotate.candidates))
    if held_out.low <= 0.5:
        problems.append(f"held-out AUC {_interval(held_out)} is not above 0.5: the Filter ranks no better than chance")
    return figures, problems


def _published(workspace: Workspace, round: int) -> tuple[int, int]:
    """Web and synthetic candidates that were kept and rejected."""
    parts = [part for part in workspace.round(round).corpus.glob("*.parquet") if not part.name.startswith("human-")]
    counts = [check_part(part, CORPUS_VERSION) for part in parts]
    return sum(int(count[KEPT_KEY]) for count in counts), sum(int(count[REJECTED_KEY]) for count in counts)


def _losses(figures: dict[str, Any], texts_per_image: int) -> Iterator[str]:
    """What failed or was lost between the URL table and the corpus."""
    download, candidates = figures["download"], figures["candidates"]
    if download["rows"] != figures["rows"]:
        yield f"{figures['rows']} rows in the URL table, {download['rows']} in the shards"
    if download["failed"] or download["reasons"]:
        yield f"{download['failed']} photographs were not downloaded: {download['reasons']}"
    if candidates != download["ok"] * texts_per_image:
        yield f"{candidates} candidates for {download['ok']} images; {texts_per_image} each are expected"
    if unreadable := sum(count for reason, count in figures["unscored"].items() if reason != EMPTY_TEXT):
        yield f"{unreadable} candidates have no scores because their images could not be decoded"
    if figures["kept"] + figures["rejected"] != candidates:
        yield f"{figures['kept']} candidates kept and {figures['rejected']} rejected, of {candidates}"
    accepted = figures["by_source"]["web"]["accepted"] + figures["by_source"]["synthetic"]["accepted"]
    if accepted != figures["kept"]:
        yield f"{figures['kept']} candidates kept, {accepted} rows in the corpus"


def held_out_auc(checkpoint: Path, held_out: PairTable) -> AUC:
    """How often the Filter's itm_score is higher for an image's own caption than for another image's."""
    pairs, rng = list(iterate_pairs(held_out)), np.random.default_rng(SEED)
    own = [_draw(pair.captions, rng) for pair in pairs]
    others = [_draw(pairs[_other(index, len(pairs), rng)].captions, rng) for index in range(len(pairs))]
    filter = Filter.load(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    device, view = next(filter.med.parameters()).device, eval_transform(filter.med.image_size)
    scores: list[float] = []
    for start in range(0, len(pairs), BATCH):
        batch = slice(start, start + BATCH)
        images = torch.stack([view(decode_image(pair.image)) for pair in pairs[batch]]).to(device)
        texts = list(zip(own[batch], others[batch], strict=True))
        scores += [score.itm for row in filter.score(images, texts) for score in row]
    found = auc(scores, [True, False] * len(pairs))
    if found is None:
        raise InputError(f"{held_out.path}: has no pairs to score")
    return found


def _interval(area: AUC) -> str:
    return f"{area.value:.3f} ({area.low:.3f} to {area.high:.3f})"


def _show(figures: dict[str, Any], answer: pa.Table, report: Path) -> None:
    table = Table("figure", "value", title="Real photographs")
    download, web_auc = figures["download"], figures["web_auc"]
    table.add_row("rows, images, failed", f"{figures['rows']:,}, {download['ok']:,}, {download['failed']:,}")
    table.add_row("candidates, unscored", f"{figures['candidates']:,}, {sum(figures['unscored'].values()):,}")
    table.add_row("kept, rejected", f"{figures['kept']:,}, {figures['rejected']:,}")
    table.add_row("ITM AUC, held out (95%)", _interval(AUC(**figures["held_out_auc"])))
    if web_auc["value"] is not None:
        table.add_row("ITM AUC, web (95%)", _interval(AUC(web_auc["value"], *web_auc["interval"])))
    for model in figures["retrieval"]:
        recall, cider = figures["retrieval"][model]["text_to_image"]["r10"], figures["captioning"][model]["cider"]
        table.add_row(f"text-to-image R@10, CIDEr, {model}", f"{recall:.3f}, {cider:.3f}")
    table.add_section()
    for step, seconds in {**figures["seconds"], "all, with measuring": figures["total_seconds"]}.items():
        table.add_row(f"seconds, {step}", f"{seconds:.1f}")
    console = Console(highlight=False)
    console.print(table)
    print_rows(answer, console)
    console.print(f"report: {report}", soft_wrap=True)


def _say(text: str, stream: Any = None) -> None:
    (stream or sys.stdout).write(f"{text}\n")


if __name__ == "__main__":
    leave(main())
