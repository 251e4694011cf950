"""`capfilt explain --replay`: the captions and scores of an image once more, round by round, by the recorded models."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from blip_core.capfilt.by_digest import find_by_digest
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.recorded import Recorded, read_recorded
from blip_core.capfilt.replay import replay
from blip_core.errors import InputError
from blip_core.med.inference import Precision
from blip_core.med.sources import locate
from blip_core.workspace import Workspace


def replay_story(
    workspace: Workspace,
    story: dict[str, Any],
    captioner: str | None = None,
    filter: str | None = None,
    tokenizer: str | None = None,
    round: int | None = None,
) -> list[dict[str, Any]]:
    """What `blip_core.capfilt.replay.replay` says of each round and shard of a story; of its models also the source.

    Args:
        captioner, filter: where the models are; without them they are looked for in the rounds.
        tokenizer: that of .pth files.
        round: this one alone.

    Raises InputError where no round has annotated the image, CheckpointError as `find_by_digest` does, and ShardError
    as `read_recorded` and `replay` do.
    """
    places = [
        (made["round"], shard)
        for made in story["rounds"]
        if round in (None, made["round"])
        for shard in sorted({row["shard"] for row in made["candidates"]})
    ]
    if not places:
        which = "no round has" if round is None else f"round {round} has not"
        raise InputError(f"uid {story['uid']!r}: {which} annotated it; there is nothing to compute again")
    records = [read_recorded(workspace, number, shard, story["uid"]) for number, shard in places]
    given = {"captioner": captioner, "filter": filter}
    sources = [
        [str(find_by_digest(workspace, kind, getattr(one, kind), given[kind])) for kind in ("captioner", "filter")]
        for one in records
    ]
    load = cache(_load)
    return [
        {"models": _models(one, *found), **replay(one, *load(*found, one.precision, tokenizer))}
        for one, found in zip(records, sources, strict=True)
    ]


def _models(one: Recorded, captioner: str, filter: str) -> dict[str, dict[str, str]]:
    return {
        "captioner": {"digest": one.captioner, "source": captioner},
        "filter": {"digest": one.filter, "source": filter},
    }


def _load(captioner: str, filter: str, precision: Precision, tokenizer: str | None) -> tuple[Captioner, Filter]:
    """Both models on the device that has the precision."""
    device = "cuda" if torch.cuda.is_available() and precision != "int8" else "cpu"
    words = [tokenizer if _is_file(source) else None for source in (captioner, filter)]
    return (
        Captioner.load(captioner, device, precision, words[0]),
        Filter.load(filter, device, tokenizer=words[1], precision=precision),
    )


def _is_file(source: str | Path) -> bool:
    return locate(source).is_file()
