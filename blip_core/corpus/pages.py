"""What shows images besides the parts: pages, the pictures of an evaluation, the history of runs, and what was left.

Pages are removed and not changed: the report and the card are made anew by `capfilt report`, an audit's page by
`capfilt audit`. The estimates of an audit that was marked are numbers, and stay.
"""

import shutil
from collections.abc import Iterable, Set
from pathlib import Path

from blip_core import stores
from blip_core.data.denied import Denied, veil
from blip_core.data.fetch import remove_left_folders
from blip_core.files import read_json, sweep, write_json
from blip_core.workspace import Round, Workspace

CARD = "README.md"
LOCK = "lock"
TEMPORARY = ".tmp"


def forget_pages(rounds: Iterable[Round], dry_run: bool = False) -> list[Path]:
    """Removes the pages of rounds that stand, and returns their paths."""
    pages = [path for made in rounds for path in (made.report, made.audit_page, made.corpus / CARD) if path.exists()]
    if not dry_run:
        for path in pages:
            path.unlink(missing_ok=True)
    return pages


def forget_examples(workspace: Workspace, denied: Denied, veiled: Set[str]) -> None:
    """Takes denied pictures out of what evaluations show; the report shows the same ones, and goes with them.

    They are known by the image's sha256, or by the uid, which is that sha256 where the table has none of its own.
    """
    for made in (workspace.round(number) for number in workspace.round_numbers()):
        if not made.evaluation.exists():
            continue
        found = read_json(made.evaluation)
        examples = {
            model: [shown for shown in pictures if not _is_denied(shown, denied, veiled)]
            for model, pictures in (found.get("examples") or {}).items()
        }
        if examples != (found.get("examples") or {}):
            made.report.unlink(missing_ok=True)
            write_json(made.evaluation, found | {"examples": examples})


def _is_denied(shown: dict[str, object], denied: Denied, veiled: Set[str]) -> bool:
    uid = str(shown.get("uid"))
    return uid in denied.images or shown.get("image_sha256") in denied.images or veil(uid) in veiled


def forget_history(workspace: Workspace, dry_run: bool = False) -> bool:
    """Removes the history of the local Prefect server, whose artifacts show pictures and texts; its lock stays.

    Returns whether there is any.
    """
    home = workspace.prefect_home
    entries = [entry for entry in home.iterdir() if entry.name != LOCK] if home.is_dir() else []
    for entry in entries if not dry_run else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return bool(entries)


def sweep_left(workspace: Workspace) -> None:
    """Removes what killed writers and downloads left: files under way may hold anything."""
    remove_left_folders(workspace.scratch / TEMPORARY)
    folders = [workspace.root, workspace.shards, workspace.plans]
    for made in (workspace.round(number) for number in workspace.round_numbers()):
        folders += [made.root, made.annotations, made.embeddings, made.corpus]
    for folder in folders:
        sweep(folder)
    if stores.is_remote(workspace.root):
        sweep(stores.cache_folder() / "writing")
