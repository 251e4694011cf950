"""`capfilt forget`: takes images out of all that the workspace holds, and keeps them out.

The deny list comes first, then the note of the checkpoints, and then what would show an image, part by part, each in
one atomic step. All of it follows from the deny list alone: whoever is killed at whatever moment begins again, with
or without the names, and comes to the same end.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blip_core import stores
from blip_core.corpus.catalog import build_catalog
from blip_core.corpus.pages import forget_examples, forget_history, forget_pages, sweep_left
from blip_core.corpus.reasons import rejections
from blip_core.corpus.removal import (
    ShardRows,
    denied_rows,
    likenesses,
    remove_annotations,
    remove_likenesses,
    remove_rows,
)
from blip_core.corpus.schemas import CORPUS_VERSION
from blip_core.corpus.selection import counts_of, read_rules
from blip_core.corpus.trained import Traces, checkpoints, trained_on, with_successors
from blip_core.data.denied import NOTHING, Denied, deny, read_denied, url_key
from blip_core.data.shards import check_part, read_shard
from blip_core.files import read_json, write_json
from blip_core.workspace import Round, Workspace

HUMAN = "human-"
Progress = Callable[[int, int], None]


class Forgotten(NamedTuple):
    """What was taken out, or would be: rows of parts and images with bytes; files that were removed or emptied.

    `pages` of rounds, by path below the workspace; `rounds`: those whose parts had something; `checkpoints` that were
    trained on what was ever forgotten here, and still stand: digest, kind, round, folder, how.
    """

    rows: int
    images: int
    shards: list[str]
    rounds: list[int]
    annotations: int
    embeddings: int
    corpus: int
    human: int
    plans: int
    pages: list[str]
    history: bool
    denied: dict[str, int]
    checkpoints: list[dict[str, Any]]


class Part(NamedTuple):
    """A part of a round, and which of its rows go."""

    round: Round
    path: Path
    gone: list[bool]
    leaderless: Sequence[bool] = ()  # of images that lost against another: whether that one goes


class Survey(NamedTuple):
    """Where denied rows stand: shards that have some, and all parts of those and of shards that had some once.

    `veiled`: the names that denied rows have, or will have, in the shards.
    """

    shards: list[ShardRows]
    veiled: frozenset[str]
    annotations: list[Part]
    embeddings: list[Part]
    corpus: list[Part]
    human: list[Part]
    left_out: list[Part]
    plans: list[Path]

    @property
    def parts(self) -> list[Part]:
        """Those that have something to lose."""
        every = (*self.annotations, *self.embeddings, *self.corpus, *self.human, *self.left_out)
        return [part for part in every if any(part.gone) or any(part.leaderless)]

    @property
    def found(self) -> bool:
        """Whether there is anything to remove."""
        return bool(self.shards or self.parts or self.plans)

    @property
    def rounds(self) -> list[Round]:
        """Whose pages may show it."""
        found = {part.round.number: part.round for part in self.parts}
        return [found[number] for number in sorted(found)]


def forget(
    workspace: Workspace, named: Denied = NOTHING, dry_run: bool = False, progress: Progress | None = None
) -> Forgotten:
    """Removes what is named, and what the deny list of earlier calls still finds, from everything in the workspace.

    A URL or a sha256 names an image: with it go all rows that have the same stored bytes, and their URLs. A domain
    names the rows of its URLs alone. No run may be at work in the workspace meanwhile.

    Args:
        dry_run: looks and counts, and changes nothing.
        progress: is told of the parts that are written anew, and how many there are.

    Raises ShardError where a part is torn, WorkspaceError where the workspace cannot be read or written.
    """
    if not dry_run:
        sweep_left(workspace)
    denied = read_denied(workspace) | _whole(workspace, named)
    survey = look(workspace, denied)
    found = trained_on(workspace, _traces(survey))
    pages = [
        *forget_pages(survey.rounds, dry_run=True),
        *forget_examples(workspace, denied, survey.veiled, dry_run=True),
    ]
    history = survey.found and forget_history(workspace, dry_run=True)
    if not dry_run:
        deny(workspace, denied)
        _note(workspace, found)
        _remove(workspace, survey, denied, progress or (lambda done, total: None))
    return _told(workspace, survey, denied, found, pages, history)


def _whole(workspace: Workspace, named: Denied) -> Denied:
    """What is named, with the images of its URLs, and the URLs of all rows with these images."""
    if not named.urls and not named.images:
        return named
    columns = list(stores.each(workspace.shard_paths(), _places))
    rows = [(key, sha256) for shard in columns for key, sha256 in shard]
    images = named.images | {sha256 for key, sha256 in rows if sha256 and key in named.urls}
    urls = named.urls | {key for key, sha256 in rows if key and sha256 in images}
    return Denied(urls, images, named.domains)


def _places(shard: Path) -> list[tuple[str | None, str | None]]:
    """The key of the URL and the image's sha256 of each row that has both."""
    rows = read_shard(shard, ["url", "sha256"])
    pairs = zip(rows["url"].to_pylist(), rows["sha256"].to_pylist(), strict=True)
    return [(url_key(url), sha256) for url, sha256 in pairs if url and sha256]


def look(workspace: Workspace, denied: Denied) -> Survey:
    """Finds the denied rows of all parts, and those that forgotten rows of a shard have left in other parts."""
    shards, veiled = [], {}
    for rows in stores.each(workspace.shard_paths(), lambda path: ShardRows(path, denied)):
        veiled[rows.path.stem] = rows.veiled
        if rows.found:
            shards.append(rows)
    every = frozenset(uid for uids in veiled.values() for uid in uids)
    survey = Survey(shards, every, [], [], [], [], [], _plans(workspace, denied))
    for made in (workspace.round(number) for number in workspace.round_numbers()):
        for folder, parts in (
            (made.annotations, survey.annotations),
            (made.embeddings, survey.embeddings),
            (made.corpus, survey.corpus),
        ):
            for path in sorted(folder.glob("*.parquet")):
                if path.name.startswith(HUMAN):
                    survey.human.append(Part(made, path, denied_rows(path, denied)))
                elif veiled.get(path.stem, {""}):  # of a shard without a denied row, no part has one
                    parts.append(Part(made, path, denied_rows(path, denied, veiled.get(path.stem, frozenset()))))
        for path in sorted(made.left_out.glob("*.parquet")) if every else ():
            survey.left_out.append(Part(made, path, *likenesses(path, veiled)))
    return survey


def _plans(workspace: Workspace, denied: Denied) -> list[Path]:
    """The plans of downloads that have a denied URL."""
    found = workspace.plans.glob("*.parquet")
    return [path for path in sorted(found) if any(denied_rows(path, denied))]


def _traces(survey: Survey) -> Traces:
    return Traces(
        frozenset(rows.path.stem for rows in survey.shards if rows.images),
        frozenset((part.round.number, part.path.stem) for part in survey.corpus if any(part.gone)),
        frozenset(part.round.number for part in survey.human if any(part.gone)),
    )


def _note(workspace: Workspace, found: dict[str, str]) -> None:
    """Keeps which checkpoints were trained on what goes now: the rows that tell it go too."""
    if not found:
        return
    before = read_json(workspace.forgotten) if workspace.forgotten.exists() else {}
    write_json(workspace.forgotten, found | before)


def _remove(workspace: Workspace, survey: Survey, denied: Denied, progress: Progress) -> None:
    if survey.found:
        forget_history(workspace)
    forget_examples(workspace, denied, survey.veiled)
    forget_pages(survey.rounds)
    steps = list(_steps(workspace, survey))
    for done, step in enumerate(steps):
        progress(done, len(steps))
        step()
    progress(len(steps), len(steps))
    if workspace.catalog.exists():
        build_catalog(workspace)


def _steps(workspace: Workspace, survey: Survey) -> Iterator[Callable[[], None]]:
    """One for each file: the corpus before the annotations, and the shards last, which know what is veiled."""
    for part in survey.human:
        yield partial(_remove_human, part)
    rows = {part.path: part.gone for part in survey.annotations}
    for part in survey.corpus:
        annotation = part.round.annotations / part.path.name
        yield partial(_remove_corpus, workspace, part, rows.get(annotation))
    for part in survey.embeddings:
        yield partial(remove_rows, part.path, part.gone)
    for part in survey.annotations:
        yield partial(remove_annotations, part.path, part.gone)
    for part in survey.left_out:
        yield partial(remove_likenesses, part.path, part.gone, part.leaderless)
    for shard in survey.shards:
        yield shard.remove
    for plan in survey.plans:
        yield partial(plan.unlink, missing_ok=True)


def _remove_human(part: Part) -> None:
    remove_rows(part.path, part.gone, counts_of(part.gone.count(False)) if any(part.gone) else None)


def _remove_corpus(workspace: Workspace, part: Part, annotated: list[bool] | None) -> None:
    """Counts anew what is kept and what is rejected of the annotations that stay (None: there are none)."""
    rules = read_rules(check_part(part.path, CORPUS_VERSION))
    rejected = None
    if annotated is not None and rules is not None:
        rejected = rejections(workspace, part.round, part.path.stem, rules, annotated)
    remove_rows(part.path, part.gone, counts_of(part.gone.count(False), rejected))


def _told(
    workspace: Workspace, survey: Survey, denied: Denied, found: dict[str, str], pages: list[Path], history: bool
) -> Forgotten:
    return Forgotten(
        rows=sum(len(rows.found) for rows in survey.shards),
        images=sum(rows.images for rows in survey.shards),
        shards=[rows.path.stem for rows in survey.shards],
        rounds=[made.number for made in survey.rounds],
        **{name: _count(getattr(survey, name)) for name in ("annotations", "embeddings", "corpus", "human")},
        plans=len(survey.plans),
        pages=sorted({str(path.relative_to(workspace.root)) for path in pages}),
        history=history,
        denied={name: len(getattr(denied, name)) for name in ("urls", "images", "domains")},
        checkpoints=_standing(workspace, found),
    )


def _count(parts: list[Part]) -> int:
    return sum(part.gone.count(True) for part in parts)


def _standing(workspace: Workspace, found: dict[str, str]) -> list[dict[str, Any]]:
    """The checkpoints that were found now or before, and still stand."""
    before = read_json(workspace.forgotten) if workspace.forgotten.exists() else {}
    models = checkpoints(workspace)
    how = with_successors(models, found | before)
    return [
        {"digest": model.digest, "kind": model.kind, "round": model.round, "folder": str(model.folder)}
        | {"how": how[model.digest]}
        for model in models
        if model.digest in how
    ]
