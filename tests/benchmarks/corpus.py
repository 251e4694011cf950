"""What the corpus costs to ask and to publish at ten million candidates: `make corpus`.

The same questions go to the catalog's views, in any DuckDB client and as `capfilt query` opens them, and, as SQL
written by hand, to the Parquet files; the three take turns, and each one's best time counts. Publishing runs in a
process of its own (publishing.py), whose peak memory is its own. The candidates are made up (candidates.py).
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import duckdb
from candidates import PER_IMAGE, make_workspace

from blip_core.corpus.query import check_statement, reading
from blip_core.corpus.rules import ImageRules, PublishConfig, TextRules
from blip_core.corpus.sql import quoted
from blip_core.workspace import Workspace

MOST_RATIO = 1.1  # of the time that SQL by hand takes
MOST_MEMORY_MB = 4295  # 4 GiB
LEAST_SECONDS = 3.0  # that a question is asked for: one of milliseconds has more turns
OURS = ("catalog", "query")
PROGRAM = Path(__file__).with_name("publishing.py")

PLAIN = PublishConfig()
STRICT = PublishConfig(
    best_of=True,
    text=TextRules(min_words=3, max_words=40, max_repeated=0.5, reject_file_names=True, reject_markup=True),
    images=ImageRules(min_side=210, max_aspect=4.0, unique=True, per_domain=1000, domain="site"),
)
ALIKE = PublishConfig(images=ImageRules(unique=True, near_duplicates=0.95))


class Question(NamedTuple):
    """One question to the views, and the same to files; `{annotations}` and the like stand for their scans."""

    views: str
    files: str


HOST = "regexp_extract(url, '^[^:]+://([^/?#:]+)', 1)"
_SWEEP = ", ".join(
    f"count(*) FILTER (WHERE source = '{source}' AND itm_score > {threshold})"
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
    for source in ("web", "synthetic")
)

QUESTIONS = {
    "sources": Question(
        "SELECT source, count(*), noise_rate(itm_score) FROM annotations GROUP BY source",
        "SELECT source, count(*), 1 - avg(itm_score) FROM {annotations} GROUP BY source",
    ),
    "histogram": Question(
        "SELECT source, floor(itm_score * 20) AS bin, count(*) FROM annotations WHERE round = 1 GROUP BY ALL",
        "SELECT source, floor(itm_score * 20) AS bin, count(*) FROM {annotations} GROUP BY ALL",
    ),
    "domains": Question(
        f"SELECT {HOST} AS host, count(*) AS images FROM annotations WHERE candidate = 0 GROUP BY host "
        "ORDER BY images DESC, host LIMIT 20",
        f"SELECT {HOST} AS host, count(*) AS images FROM {{annotations}} WHERE candidate = 0 GROUP BY host "
        "ORDER BY images DESC, host LIMIT 20",
    ),
    "sweep": Question(f"SELECT {_SWEEP} FROM annotations", f"SELECT {_SWEEP} FROM {{annotations}}"),
    "best_of_k": Question(
        "SELECT count(*), avg(best), avg(length(said)) FROM (SELECT max(itm_score) AS best, arg_max(text, itm_score) "
        "AS said FROM annotations WHERE source = 'synthetic' GROUP BY shard, uid)",
        "SELECT count(*), avg(best), avg(length(said)) FROM (SELECT max(itm_score) AS best, arg_max(text, itm_score) "
        "AS said FROM {annotations} WHERE source = 'synthetic' GROUP BY shard, uid)",
    ),
    "corpus": Question(
        "SELECT source, count(*), avg(itc_score), avg(width * height) FROM corpus GROUP BY source",
        "SELECT source, count(*), avg(itc_score), avg(width * height) FROM {corpus} GROUP BY source",
    ),
    "failures": Question(
        "SELECT reason, count(*) FROM images WHERE status = 'failed' GROUP BY reason",
        "SELECT reason, count(*) FROM {images} WHERE status = 'failed' GROUP BY reason",
    ),
    "same_bytes": Question(
        "SELECT sha256, count(*) AS times FROM images WHERE status = 'ok' GROUP BY sha256 HAVING times > 1 "
        "ORDER BY times DESC, sha256 LIMIT 20",
        "SELECT sha256, count(*) AS times FROM {images} WHERE status = 'ok' GROUP BY sha256 HAVING times > 1 "
        "ORDER BY times DESC, sha256 LIMIT 20",
    ),
    "near_duplicates": Question(
        "SELECT uid, other, similarity FROM near_duplicates(0.95)",
        "WITH e AS (SELECT uid, embedding FROM {embeddings}) SELECT a.uid, b.uid, "
        "list_cosine_similarity(a.embedding, b.embedding) AS similarity FROM e AS a JOIN e AS b ON a.uid < b.uid "
        "AND list_cosine_similarity(a.embedding, b.embedding) >= 0.95 ORDER BY similarity DESC, 1, 2",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 where a figure is not as it should be."""
    options = _options(arguments)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="capfilt-corpus-", dir=options.folder) as folder:
        figures = measure(Path(folder), options)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n" if options.json else told(figures))
    found = faults(figures)
    sys.stderr.writelines(f"{fault}\n" for fault in found)
    return 1 if found else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="candidates")
    parser.add_argument("--embedded", type=int, default=2400, help="images that the question near_duplicates compares")
    parser.add_argument(
        "--alike", type=int, default=100_000, help="images that are published with near_duplicates; 0: none"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured turns of each question at least")
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed; default: the system's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Makes the candidates in `folder`, publishes and asks."""
    began = time.monotonic()
    root = folder / "all"
    make_workspace(root, options.rows, options.embedded, os.cpu_count() or 1)
    generated = time.monotonic() - began
    _say(f"{options.rows} candidates after {generated:.0f} s")
    published = {"predicate": _published(root, PLAIN)}
    questions = ask(Workspace.existing(root), options.repeats)
    published["rules"] = _published(root, STRICT)
    if options.alike:
        make_workspace(folder / "alike", options.alike * PER_IMAGE, options.alike, os.cpu_count() or 1)
        published["near_duplicates"] = _published(folder / "alike", ALIKE)
    return {
        "rows": options.rows,
        "embedded": options.embedded,
        "alike": options.alike,
        "questions": questions,
        "published": published,
        "generate_seconds": round(generated, 1),
        "seconds": round(time.monotonic() - began, 1),
        "disk_mb": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 10**6,
        "cores": os.cpu_count(),
        "duckdb": duckdb.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def ask(workspace: Workspace, repeats: int) -> dict[str, dict[str, Any]]:
    """By question: the seconds of each side, the ratios to those by hand, and whether the answers are the same."""
    found = {}
    with _sides(workspace) as sides:
        for name, question in QUESTIONS.items():
            found[name] = _asked(sides, question, workspace.root, repeats)
            _say(f"{name}: {found[name]}")
    return found


@contextmanager
def _sides(workspace: Workspace) -> Iterator[dict[str, duckdb.DuckDBPyConnection]]:
    """What is asked: catalog.duckdb in a plain client, the views as `capfilt query` opens them, and the files."""
    with (
        reading(workspace) as query,
        duckdb.connect(workspace.catalog, read_only=True) as catalog,
        duckdb.connect() as hand,
    ):
        catalog.execute(f"SET file_search_path = {quoted(str(workspace.root))}")
        yield {"catalog": catalog, "query": query, "hand": hand}


def _asked(
    sides: Mapping[str, duckdb.DuckDBPyConnection], question: Question, root: Path, repeats: int
) -> dict[str, Any]:
    check_statement(sides["query"], question.views)
    sql = dict.fromkeys(sides, question.views) | {"hand": question.files.format(**_scans(root))}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    answers: dict[str, list[tuple[Any, ...]]] = {}
    start = time.perf_counter()
    for turn in itertools.count():
        if turn > repeats and time.perf_counter() - start > LEAST_SECONDS:
            break
        for side in sorted(sides, reverse=bool(turn % 2)):
            began, used = time.perf_counter(), time.process_time()
            rows = sides[side].execute(sql[side]).fetchall()
            if turn:  # the first one is the warm-up
                times[side].append((time.perf_counter() - began, time.process_time() - used))
            answers[side] = sorted(rows, key=repr)
    same = all(_same(answers[side], answers["hand"]) for side in sides)
    return {**_compared(times), "turns": turn - 1, "rows": len(answers["hand"]), "same": same}


def _compared(times: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, float]:
    """The best time of each side, and its median CPU time, with their ratios to those by hand."""
    best = {side: min(seconds for seconds, _ in found) for side, found in times.items()}
    cpu = {side: statistics.median(used for _, used in found) for side, found in times.items()}
    figures = {f"{side}_seconds": round(seconds, 4) for side, seconds in best.items()}
    for side in OURS:
        figures[f"{side}_ratio"] = round(best[side] / best["hand"], 3)
        figures[f"{side}_cpu_ratio"] = round(cpu[side] / cpu["hand"], 3)
    return figures


def _scans(root: Path) -> dict[str, str]:
    """What a person would write: the files of the round that is asked about."""
    folders = {"images": "shards", **{kind: f"rounds/0001/{kind}" for kind in ("annotations", "corpus", "embeddings")}}
    return {kind: f"read_parquet({quoted(f'{root}/{folder}/*.parquet')})" for kind, folder in folders.items()}


def _same(ours: list[tuple[Any, ...]], theirs: list[tuple[Any, ...]]) -> bool:
    """Whether two answers are the same but for the order in which numbers were summed up."""
    if len(ours) != len(theirs):
        return False
    values = (zip(row, match, strict=True) for row, match in zip(ours, theirs, strict=True))
    return all(_alike(one, other) for pairs in values for one, other in pairs)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def _published(root: Path, config: PublishConfig) -> dict[str, Any]:
    """Publishes anew in a process of its own; adds what is known of it by hand."""
    workspace = Workspace.existing(root)
    for folder in (workspace.round(1).corpus, workspace.round(1).left_out):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(PROGRAM), str(root), json.dumps(asdict(config))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"publishing failed: {done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    figures["complete"] = _complete(root, figures, config)
    _say(f"published: {figures}")
    return figures


def _complete(root: Path, figures: Mapping[str, Any], config: PublishConfig) -> bool:
    """Whether every candidate was kept or rejected, and kept is what the files have; by the predicate alone, all for
    which it is true."""
    scans = _scans(root)
    counts = f"SELECT count(*), count(*) FILTER (WHERE {config.where}) FROM {scans['annotations']}"
    [(candidates, passing)] = duckdb.sql(counts).fetchall()
    [(kept,)] = duckdb.sql(f"SELECT count(*) FROM {scans['corpus']}").fetchall()
    whole = figures["kept"] + figures["rejected"] == candidates and figures["kept"] == kept
    return whole and (kept == passing if config == PLAIN else 0 < kept < passing)


def faults(figures: Mapping[str, Any]) -> list[str]:
    """What is not as it should be, in one line each."""
    found = []
    for name, asked in figures["questions"].items():
        if not asked["same"]:
            found.append(f"{name}: the views give another answer than the files")
        found += [
            f"{name}: {key} is {asked[key]}, above {MOST_RATIO}"
            for key in (f"{side}_ratio" for side in OURS)
            if asked[key] > MOST_RATIO
        ]
    for name, published in figures["published"].items():
        if not published["complete"]:
            found.append(f"publishing by {name}: kept and rejected are not all candidates, or not the right ones")
        if published["peak_memory_mb"] > MOST_MEMORY_MB:
            found.append(f"publishing by {name}: {published['peak_memory_mb']} MB, above {MOST_MEMORY_MB}")
    return found


def told(figures: Mapping[str, Any]) -> str:
    """Two tables for people."""
    lines = [f"{figures['rows']} candidates, {figures['cores']} cores, {figures['date']}", ""]
    sides = [f"{side}{key}" for side in OURS for key in ("_ratio", "_cpu_ratio")]
    columns = ["hand_seconds", "catalog_seconds", "query_seconds", *sides, "rows", "same"]
    lines += _table("question", columns, figures["questions"])
    columns = ["shards", "kept", "rejected", "seconds", "cpu_seconds", "peak_memory_mb", "complete"]
    lines += ["", *_table("published by", columns, figures["published"])]
    return "\n".join(lines) + "\n"


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [[title, *columns], *([name, *(str(row[column]) for column in columns)] for name, row in rows.items())]
    return ["".join(f"{word:>17}" for word in line) for line in lines]


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
