"""From an image to the checkpoints that were trained on it, by the record that each training leaves of its data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blip_core.data.pairs import PairSource
from blip_core.data.seen import see
from blip_core.errors import CapfiltError, CheckpointError
from blip_core.files import read_json
from blip_core.med.description import DATA, read_checkpoint_config
from blip_core.workspace import Workspace

MODELS = ("med", "captioner", "filter", "retrained", "retrained_raw")

WEB, CORPUS, ANEW, HUMAN = "web pairs", "corpus", "corpus, published anew since", "human pairs"
UNKNOWN = "unknown: it has no data.json"


class Traces(NamedTuple):
    """Where images are: shards that hold one; (round, shard) of corpus parts with a text of one; rounds whose human
    pairs have one."""

    shards: frozenset[str] = frozenset()
    parts: frozenset[tuple[int, str]] = frozenset()
    human: frozenset[int] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.shards or self.parts or self.human)


class Checkpoint(NamedTuple):
    """A model of a round; `start` is the digest of the one that it began with, `seen` the record of its data."""

    digest: str
    kind: str
    round: int
    folder: Path
    start: str | None
    seen: Mapping[str, Any] | None


def checkpoints(workspace: Workspace) -> list[Checkpoint]:
    """The checkpoints of all rounds that stand whole, in the order in which they are made."""
    found = []
    for number in workspace.round_numbers():
        for kind in MODELS:
            folder: Path = getattr(workspace.round(number), kind)
            try:
                config = read_checkpoint_config(folder) if folder.exists() else {}
            except CheckpointError:
                config = {}  # a torn one stands for nothing
            if config:
                start = config["start"] if isinstance(config.get("start"), str) else None
                seen = read_json(folder / DATA) if (folder / DATA).is_file() else None
                found.append(Checkpoint(config["digest"], kind, number, folder, start, seen))
    return found


def trained_on(workspace: Workspace, traces: Traces) -> dict[str, str]:
    """How each checkpoint came to be trained on an image with these traces, by digest; others are not in it.

    WEB, CORPUS or HUMAN pairs; ANEW where the corpus is not the one that was trained on any more, and nothing tells;
    `began with ...` for one that goes on from such a model; UNKNOWN for one that does not say what it saw.
    """
    if not traces:
        return {}
    standing = checkpoints(workspace)
    tables = {source["digest"] for model in standing if model.round in traces.human for source in _human(model)}
    found = {model.digest: how for model in standing if (how := _how(workspace, model, traces, tables))}
    return with_successors(standing, found)


def with_successors(standing: list[Checkpoint], found: Mapping[str, str]) -> dict[str, str]:
    """Those that were found, and the ones that began with one of them, in turn."""
    every = dict(found)
    for _ in standing:
        for model in standing:
            known = every.get(model.digest, UNKNOWN)
            if known == UNKNOWN and every.get(model.start or "", UNKNOWN) != UNKNOWN:
                every[model.digest] = f"began with {model.start}"
    return every


def _human(model: Checkpoint) -> list[Mapping[str, Any]]:
    return [source for source in (model.seen or {}).get("sources", []) if source["kind"] == "human"]


def _how(workspace: Workspace, model: Checkpoint, traces: Traces, tables: set[str]) -> str | None:
    if model.seen is None:
        return UNKNOWN
    for source in model.seen["sources"]:
        kind, name = source["kind"], source["name"]
        if kind == "shard" and name in traces.shards:
            return WEB
        if kind == "corpus" and (model.round, name) in traces.parts:
            return CORPUS
        if kind == "human" and source["digest"] in tables:
            return HUMAN
    changed = (source for source in model.seen["sources"] if source["kind"] == "corpus")
    if any(source["name"] in traces.shards and _differs(workspace, model, source) for source in changed):
        return ANEW
    return None


def _differs(workspace: Workspace, model: Checkpoint, source: Mapping[str, Any]) -> bool:
    """Whether a corpus part is not as it was trained on."""
    shard, part = (folder / f"{source['name']}.parquet" for folder in (workspace.shards, _corpus(workspace, model)))
    try:
        now = see([PairSource(shard, caption=None, uid="uid", texts=part)], None)
    except CapfiltError:
        return True  # gone, or torn
    return bool(now.record["sources"][0]["digest"] != source["digest"])


def _corpus(workspace: Workspace, model: Checkpoint) -> Path:
    return workspace.round(model.round).corpus
