"""The dataset card of a round's corpus: README.md beside its parts, with the front matter of the Hugging Face hub.

It holds no time of day, and is written anew only where it would differ.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from blip_core.corpus.explain import describe_models
from blip_core.corpus.schemas import COLUMN_MEANINGS, CORPUS_SCHEMA
from blip_core.evaluation.report import build_report
from blip_core.evaluation.tables import RoundTables
from blip_core.files import atomic_file
from blip_core.workspace import Workspace

CARD = "README.md"
DOMAINS = 20
LICENCES = (
    "Texts and images belong to those who made them; nothing is known here of the licence of any of them. What may be "
    "done with them depends on the page that a row's `url` comes from, and on where you are."
)
NO_HOST = re.compile(r"[^a-z0-9.:_\[\]-]")
MOST_LETTERS = 253  # of a host's name (RFC 1035)
# Upper bounds of the hub's size categories, in rows.
SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
    100_000_000: "10M<n<100M",
    1_000_000_000: "100M<n<1B",
}


def write_card(workspace: Workspace, round: int) -> Path | None:
    """Writes `corpus/README.md` of a round and returns its path; None where no corpus stands.

    Raises WorkspaceError where there is no such round.
    """
    folder = workspace.round(round).corpus
    if not any(folder.glob("*.parquet")):
        return None
    text = card(workspace, round)
    path = folder / CARD
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def card(workspace: Workspace, round: int) -> str:
    """The card's text: front matter in YAML, then Markdown in which no text of the web is markup."""
    numbers = build_report(workspace, round)
    with RoundTables.open(workspace, round) as tables:
        (images, scores), domains = tables.kept(), tables.domains()
        estimated, _ = tables.kept_noise()
    title = f"Corpus of round {round}"
    texts = sum(source["accepted"] for source in numbers["by_source"].values())
    body = (
        _environment()
        .get_template("card.md.jinja")
        .render(
            numbers,
            title=title,
            kept_scores=scores,
            images_kept=images,
            estimated_noise=estimated,
            models=_models(workspace, numbers["models"]),
            licences=LICENCES,
            domains=[{"name": name, "images": images, "texts": count} for name, images, count in domains[:DOMAINS]],
            other_domains=max(0, len(domains) - DOMAINS),
            columns=[
                {"name": field.name, "type": str(field.type), "meaning": COLUMN_MEANINGS[field.name]}
                for field in CORPUS_SCHEMA
            ],
        )
    )
    return f"---\n{_front_matter(title, texts)}\n---\n\n{body}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("blip_core.evaluation", ""),
        autoescape=False,  # Markdown; the only text of the web in it, a domain, goes through `code`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"thousands": "{:,}".format, "fraction": _fraction, "code": _code}
    return environment


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _code(name: str) -> str:
    """A host's name as Markdown's code; what no host's name has is shown as a question mark."""
    return f"`{NO_HOST.sub('?', name[:MOST_LETTERS])}`"


def _front_matter(title: str, texts: int) -> str:
    size = next((name for limit, name in SIZES.items() if texts < limit), "n>1B")
    data = DatasetCardData(
        pretty_name=title,
        license="other",
        license_name="unknown",
        task_categories=["image-to-text"],
        size_categories=size,
        tags=["capfilt", "image-text pairs", "web"],
        configs=[{"config_name": "default", "data_files": "*.parquet"}],
    )
    return str(data.to_yaml())


def _models(workspace: Workspace, digests: Mapping[str, list[str]]) -> list[dict[str, str]]:
    """Captioner, Filter, and the models that they began with."""
    roles = {digest: role.capitalize() for role, found in digests.items() for digest in found}
    described = describe_models(workspace, set(roles) - {None})
    return [
        {"role": roles.get(digest, "began with"), "digest": digest, "known": _known(described[digest])}
        for digest in sorted(described, key=lambda digest: (roles.get(digest, "~"), digest))
    ]


def _known(model: Mapping[str, Any]) -> str:
    if not model:
        return "given, not trained here"
    told = {"steps": "{} steps", "seed": "seed {}", "data": "data `{}`", "start": "began with `{}`"}
    parts = [text.format(model[key]) for key, text in told.items() if isinstance(model.get(key), int | str)]
    return ", ".join([f"{model['kind']} of round {model['round']}", *parts])
