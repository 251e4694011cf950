"""What the report reads of a round: its parts as DuckDB tables, counted, binned and ranked in SQL."""

import glob
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from blip_core import stores
from blip_core.corpus.retried import any_retried, settled_once
from blip_core.corpus.rules import REJECTIONS, PublishConfig
from blip_core.corpus.schemas import ANNOTATION_SCHEMA, CORPUS_SCHEMA
from blip_core.corpus.selection import published_rules, read_rejections
from blip_core.corpus.sql import HOST, let_reach, quoted
from blip_core.data.shards import SHARD_SCHEMA
from blip_core.workspace import Workspace

BINS = 40

# best kept, worst kept, best rejected: which verdict, and whether the best score comes first
GRIDS = {"best_kept": (True, "DESC"), "worst_kept": (True, "ASC"), "best_rejected": (False, "DESC")}


@dataclass(frozen=True)
class RoundTables:
    """A round's tables `images` (without bytes), `annotations` and `corpus`, empty where nothing stands yet."""

    workspace: Workspace
    number: int
    connection: duckdb.DuckDBPyConnection

    @classmethod
    @contextmanager
    def open(cls, workspace: Workspace, number: int) -> Iterator["RoundTables"]:
        """The tables, for the length of a with block."""
        paths = workspace.round(number)
        folders = {
            "images": (workspace.shards, pa.schema([field for field in SHARD_SCHEMA if field.name != "image"])),
            "annotations": (paths.annotations, ANNOTATION_SCHEMA),
            "corpus": (paths.corpus, CORPUS_SCHEMA),
        }
        with duckdb.connect() as connection:
            let_reach(connection, workspace.root)
            for name, (folder, schema) in folders.items():
                parts = [str(part) for part in sorted(folder.glob("*.parquet"))]
                if parts and name == "images" and any_retried(workspace):
                    read = f"read_parquet({quoted(f'{glob.escape(str(folder))}/*.parquet')}, filename = true)"
                    query = f"SELECT * EXCLUDE (filename) FROM {read} WHERE {settled_once(read)}"  # noqa: S608
                    connection.sql(query).create_view(name)
                elif parts and stores.is_remote(folder):
                    connection.read_parquet(f"{glob.escape(str(folder))}/*.parquet").create_view(name)
                elif parts:
                    connection.read_parquet(parts).create_view(name)
                else:
                    connection.register(name, schema.empty_table())
            yield cls(workspace, number, connection)

    def download(self) -> dict[str, Any]:
        """Input rows, what arrived, what failed, and why."""
        counts = dict(self._rows("SELECT status, count(*) FROM images GROUP BY ALL"))
        reasons = self._rows("SELECT reason, count(*) AS n FROM images WHERE reason IS NOT NULL GROUP BY 1 ORDER BY 1")
        ok, failed = counts.get("ok", 0), counts.get("failed", 0)
        return {"rows": ok + failed, "ok": ok, "failed": failed, "reasons": dict(reasons)}

    def by_source(self) -> dict[str, dict[str, int]]:
        """Candidates and accepted texts of each source; human pairs are no candidates."""
        candidates = dict(self._rows("SELECT source, count(*) FROM annotations GROUP BY ALL"))
        accepted = dict(self._rows("SELECT source, count(*) FROM corpus GROUP BY ALL"))
        return {
            "web": {"candidates": candidates.get("web", 0), "accepted": accepted.get("web", 0)},
            "synthetic": {"candidates": candidates.get("synthetic", 0), "accepted": accepted.get("synthetic", 0)},
            "human": {"accepted": accepted.get("human", 0)},
        }

    def unscored(self) -> dict[str, int]:
        """Candidates without scores, by reason."""
        return dict(
            self._rows("SELECT reason, count(*) FROM annotations WHERE reason IS NOT NULL GROUP BY 1 ORDER BY 1")
        )

    def scores(self) -> dict[str, dict[str, float | None]]:
        """Mean itm_score and itc_score of each source's candidates; null where none has any."""
        means = self._rows("SELECT source, avg(itm_score), avg(itc_score) FROM annotations GROUP BY source")
        found = {source: (itm, itc) for source, itm, itc in means}
        pairs = {source: found.get(source, (None, None)) for source in ("web", "synthetic")}
        return {source: {"itm_score": itm, "itc_score": itc} for source, (itm, itc) in pairs.items()}

    def models(self) -> dict[str, list[str]]:
        """The digests of the Captioners and Filters whose work the annotations are."""
        columns = {"captioner": "captioner", "filter": '"filter"'}
        return {
            name: [digest for (digest,) in self._rows(f"SELECT DISTINCT {column} FROM annotations ORDER BY 1")]  # noqa: S608
            for name, column in columns.items()
        }

    def rules(self) -> PublishConfig | None:
        """The rules that the round was published with; None where nothing is published."""
        return published_rules(self.workspace.round(self.number).corpus)

    def rejected(self) -> dict[str, int]:
        """The candidates that the corpus parts rejected, by reason, in the order of the rules."""
        parts = sorted(self.workspace.round(self.number).corpus.glob("*.parquet"))
        counts = sum(stores.each(parts, read_rejections), Counter[str]())
        return {reason: counts[reason] for reason in REJECTIONS if counts[reason]}

    def kept(self) -> tuple[int, dict[str, float]]:
        """Distinct images of the corpus, and the mean itm_score of its texts by source; human pairs have none."""
        ((images,),) = self._rows("SELECT count(DISTINCT image_sha256) FROM corpus")
        means = self._rows("SELECT source, avg(itm_score) FROM corpus WHERE itm_score IS NOT NULL GROUP BY source")
        return images, dict(means)

    def domains(self) -> list[tuple[str, int, int]]:
        """Host, distinct images and texts of the corpus's URLs; the largest first."""
        return self._rows(
            f"SELECT {HOST} AS host, count(DISTINCT image_sha256), count(*) FROM corpus "  # noqa: S608
            "WHERE url IS NOT NULL GROUP BY host ORDER BY 2 DESC, 1"
        )

    def kept_noise(self) -> tuple[float | None, tuple[str, ...]]:
        """1 - the mean itm_score of the web and synthetic texts that were kept, and whose scores these are.

        None where none were kept.
        """
        query = "SELECT 1 - avg(itm_score), list(DISTINCT \"filter\") FROM corpus WHERE source <> 'human'"
        ((noise, filters),) = self._rows(query)
        return noise, tuple(sorted(filters or ()))

    def score_bins(self, source: str) -> list[int]:
        """Candidates of a source in each of 40 equal bins of itm_score from 0 to 1."""
        counts = dict(
            self._rows(
                "SELECT least(floor(itm_score * ?)::INTEGER, ? - 1) AS bin, count(*) FROM annotations "
                "WHERE source = ? AND itm_score IS NOT NULL GROUP BY 1",
                [BINS, BINS, source],
            )
        )
        return [counts.get(place, 0) for place in range(BINS)]

    def grid(self, name: str, size: int) -> list[dict[str, Any]]:
        """The best or worst scored rows of one verdict, at most one an image, with the image's bytes."""
        kept, order = GRIDS[name]
        rows = self._rows(_grid_query(order), [kept, size])
        names = ("uid", "shard", "text", "source", "itm_score", "itc_score")
        found = [dict(zip(names, row, strict=True)) for row in rows]
        images = self.images([(row["shard"], row["uid"]) for row in found])
        return [{**row, "image": images[key]} for row in found if (key := (row["shard"], row["uid"])) in images]

    def images(self, wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], bytes]:
        """Image bytes by shard and uid, of those that are there, read from the row groups that may hold them."""
        found: dict[tuple[str, str], bytes] = {}
        for shard in sorted({shard for shard, _ in wanted}):
            path = self.workspace.shard(shard)
            uids = [uid for other, uid in wanted if other == shard]
            if path.exists():
                rows = pq.read_table(
                    stores.readable(path), columns=["uid", "image"], filters=[("uid", "in", uids)]
                ).to_pylist()
                found |= {(shard, row["uid"]): row["image"] for row in rows if row["image"]}
        return found

    def _rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, list(parameters)).fetchall()


def _grid_query(order: str) -> str:
    return f"""
        SELECT uid, shard, text, source, itm_score, itc_score
        FROM annotations AS judged
        WHERE itm_score IS NOT NULL AND (? = EXISTS (
            FROM corpus WHERE corpus.uid = judged.uid AND corpus.shard = judged.shard
                AND corpus.candidate = judged.candidate))
        QUALIFY row_number() OVER (PARTITION BY uid ORDER BY itm_score {order}, candidate) = 1
        ORDER BY itm_score {order}, itc_score {order}, uid
        LIMIT ?
    """  # noqa: S608  (the order is one of two words of ours)


def read_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Training metrics by model, one row each step that was logged; a torn last line is passed over."""
    metrics = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        metrics[path.stem] = [json.loads(line) for line in lines if line.endswith("\n")]
    return metrics
