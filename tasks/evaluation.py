"""Evaluating a round: the trained models on the held-out pairs, the corpus against the truth where it is known."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.config import BootstrapConfig
from blip_core.evaluation import audit, heldout
from blip_core.files import fingerprint, read_json, write_json
from blip_core.med.description import read_checkpoint_config
from blip_core.stores import each, located
from blip_core.workspace import Round
from tasks import progress
from tasks.workplace import add_seconds, round_of, workspace_of


@task(name="evaluate-round", task_run_name="evaluate-round", cache_policy=NO_CACHE)
def evaluate_round(config: BootstrapConfig) -> None:
    """Writes evaluation.json, unless it stands for the same models, corpus and settings."""
    current = round_of(config)
    mark = _mark(config, current)
    if current.evaluation.exists() and read_json(current.evaluation).get("fingerprint") == mark:
        return
    began = time.monotonic()
    scores = _evaluate_models(config, current)
    write_json(
        current.evaluation,
        {
            "fingerprint": mark,
            "retrieval": {model: score["retrieval"] for model, score in scores.items()},
            "captioning": {model: score["captioning"] for model, score in scores.items()},
            "examples": {model: score["examples"] for model, score in scores.items()},
            "audit": audit.audit(workspace_of(config), config.round, located(config.truth)) if config.truth else None,
        },
    )
    add_seconds(config, "evaluation", time.monotonic() - began)


def trained_models(current: Round) -> list[Path]:
    """The checkpoints of a round that are evaluated, as far as they stand."""
    folders = (current.med, current.retrained, current.retrained_raw)
    return [folder for folder in folders if (folder / "config.json").is_file()]


def _evaluate_models(config: BootstrapConfig, current: Round) -> dict[str, dict[str, Any]]:
    if config.held_out is None:
        return {}
    folders = trained_models(current)
    scores = {}
    for done, folder in enumerate(folders):
        progress.show("evaluation", done, len(folders), folder.name)
        scores[folder.name] = heldout.evaluate_checkpoint(folder, config.held_out, config.evaluation)
    progress.show("evaluation", len(folders), len(folders))
    return scores


def _mark(config: BootstrapConfig, current: Round) -> str:
    tables = [located(path) for path in [*(config.held_out.files() if config.held_out else []), config.truth] if path]
    return fingerprint(
        "evaluation/1",
        [read_checkpoint_config(folder)["digest"] for folder in trained_models(current)],
        asdict(config.evaluation),
        _identities(
            [*tables, *sorted(current.annotations.glob("*.parquet")), *sorted(current.corpus.glob("*.parquet"))]
        ),
    )


def _identities(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """A part that is written again is another file, even under the same name."""
    return list(each(paths, lambda path: (path.name, (status := path.stat()).st_size, status.st_mtime_ns)))
