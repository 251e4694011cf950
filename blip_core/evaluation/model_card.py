"""The card of a checkpoint that goes out: README.md with the front matter of the Hugging Face hub.

It holds no path and no time of day. A card that a person wrote, or changed by one letter, is left as it is: ours end
with a digest of their own text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from blip_core import stores
from blip_core.capfilt.by_digest import folder_of
from blip_core.evaluation.model_metrics import Metric, metrics_of
from blip_core.files import atomic_file, fingerprint, read_json
from blip_core.med.architecture import FACES, Face
from blip_core.med.description import CONFIG, DATA, read_checkpoint_config
from blip_core.med.sources import HUB_NAME, locate
from blip_core.workspace import Round, Workspace

CARD = "README.md"
FILES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
Format = Literal["capfilt", "transformers"]
# The folders of a round, as a Round names them, and what is said of them.
ROUND_MODELS = {
    "med": "pre-trained on web and human pairs",
    "captioner": "fine-tuned on human pairs to write captions",
    "filter": "fine-tuned on human pairs to tell whether a text belongs to an image",
    "retrained": "trained from scratch on the cleaned corpus and human pairs",
    "retrained-raw": "trained from scratch on the raw web pairs and human pairs, to compare with",
}
KINDS = {("decoder",): "Captioner", ("encoder",): "Filter", ("encoder", "decoder"): "MED"}
TAGS: dict[Face, str] = {"encoder": "image-text-matching", "decoder": "image-captioning"}
# What a person may have said of the checkpoint that this one is made of, and holds of this one too.
INHERITED = ("license", "license_name", "license_link", "language", "datasets")
UNKNOWN_LICENSE = {"license": "other", "license_name": "unknown"}
TOLD_SETTINGS = ("steps", "batch_size", "learning_rate", "warmup_steps", "weight_decay", "image_size", "precision")
# What config.json may say of how a checkpoint came to be, whoever wrote it.
ORIGIN = ("start", "source", "seed", "data", "undecodable", "format")
SIGNATURE = re.compile(r"\n<!-- capfilt card ([0-9a-f]{16}):[^\n]*-->\n\Z")


@dataclass(frozen=True)
class ModelFacts:
    """What a card tells.

    Attributes:
        faces: those that are in the folder.
        config: of `read_checkpoint_config`: sizes, digest, and what made it.
        seen: what data.json holds of the training's data; empty where there is none.
        round, model: where it was trained, if that is a round of a workspace; the folder's name there.
        converted: whether the weights were written anew, from what `config` describes.
        hub: the hub's name of what it was converted from.
        began: names on the hub of the pre-trained encoders that its first training began with.
        said: INHERITED of the card of the checkpoint that it was converted from.
    """

    format: Format
    faces: tuple[Face, ...]
    config: Mapping[str, Any]
    seen: Mapping[str, Any] = field(default_factory=dict)
    round: int | None = None
    model: str | None = None
    converted: bool = False
    hub: str | None = None
    began: tuple[str, ...] = ()
    metrics: Sequence[Metric] = ()
    said: Mapping[str, Any] = field(default_factory=dict)


def write_round_cards(workspace: Workspace, round: int) -> list[Path]:
    """Writes the card of every checkpoint of a round; returns those of which ours stands now."""
    folders = [workspace.round(round).root / model for model in ROUND_MODELS]
    there = [folder for folder in folders if (folder / CONFIG).exists()]
    facts = [facts_of(folder, "capfilt", read_checkpoint_config(folder)) for folder in there]
    written = [write_model_card(folder, told) for folder, told in zip(there, facts, strict=True)]
    return [path for path in written if path is not None]


def write_model_card(folder: Path, facts: ModelFacts) -> Path | None:
    """Writes README.md into a checkpoint's folder and returns its path; None where a person's stands."""
    path, text = folder / CARD, model_card(facts)
    before = path.read_text(encoding="utf-8") if path.exists() else None
    if before is not None and not _is_ours(before):
        return None
    if before != text:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def facts_of(
    source: str | Path, format: Format, config: Mapping[str, Any], faces: Sequence[Face] = (), converted: bool = False
) -> ModelFacts:
    """What is known of a checkpoint, a folder, a file or a name on the hub, that goes out in a format.

    Args:
        config: what `read_checkpoint_config` says of it.
        faces: those that go out; all of the checkpoint's if none are given.
        converted: as in ModelFacts.
    """
    path = locate(source)
    made = _round_of(path)
    model = path.name if made is not None else None
    return ModelFacts(
        format=format,
        faces=tuple(face for face in FACES if face in (faces or config["faces"])),
        config=config,
        seen=read_json(path / DATA) if path.is_dir() and (path / DATA).exists() else {},
        round=made.number if made else None,
        model=model,
        converted=converted,
        hub=_hub_name(source, config),
        began=_began_with(config, made),
        metrics=metrics_of(made, path.name, config["digest"]) if made else (),
        said=_said(path),
    )


def model_card(facts: ModelFacts) -> str:
    """The card's text: front matter in YAML, Markdown, and its signature."""
    kind = KINDS[facts.faces]
    title = f"{kind} of round {facts.round}" if facts.round else f"BLIP {kind}"
    body = (
        _environment()
        .get_template("model_card.md.jinja")
        .render(
            facts=facts,
            origin=dict.fromkeys(ORIGIN) | {name: facts.config[name] for name in ORIGIN if name in facts.config},
            title=title,
            kind=kind,
            what=ROUND_MODELS.get(facts.model or ""),
            sizes=facts.config["med"],
            settings={name: _settings(facts)[name] for name in TOLD_SETTINGS if _settings(facts).get(name) is not None},
            prompt=_settings(facts).get("prompt") or "",
            data=_data(facts.seen),
            licence_known=facts.said.get("license", "other") != "other",
        )
    )
    text = f"---\n{_front_matter(facts, title)}\n---\n\n{body}"
    return f"{text}\n<!-- capfilt card {fingerprint(text)}: once changed by hand, it is left as it is -->\n"


def _is_ours(text: str) -> bool:
    """Whether nobody has changed a letter of it."""
    signed = SIGNATURE.search(text)
    return signed is not None and fingerprint(text[: signed.start()]) == signed[1]


def _front_matter(facts: ModelFacts, title: str) -> str:
    results = [
        EvalResult(
            task_type=metric.task,
            dataset_type=re.sub(r"\W+", "-", metric.measured_on),  # by which the hub keeps results apart
            dataset_name=metric.measured_on,
            metric_type=metric.metric,
            metric_name=metric.name,
            metric_value=round(metric.value, 4),
        )
        for metric in facts.metrics
    ]
    licence: Mapping[str, Any] = {} if "license" in facts.said else UNKNOWN_LICENSE
    data = ModelCardData(
        **facts.said,
        **licence,
        library_name=facts.format,
        pipeline_tag="image-to-text" if "decoder" in facts.faces else "other",
        tags=["capfilt", "blip", *(TAGS[face] for face in facts.faces), "arxiv:2201.12086"],
        base_model=_one_or_all([facts.hub] if facts.hub else [*facts.began]),
        model_name=title if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _one_or_all(names: list[str]) -> str | list[str] | None:
    return names[0] if len(names) == 1 else names or None


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("blip_core.evaluation", ""),
        autoescape=False,  # Markdown; names that others chose go through `code`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"thousands": "{:,}".format, "code": _code}
    return environment


def _code(text: object) -> str:
    """A name or a prompt as Markdown's code, on one line."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"


def _settings(facts: ModelFacts) -> dict[str, Any]:
    """The recipe, and the steps that were done."""
    train = facts.config.get("train")
    own = {"steps": facts.config.get("steps")} if "steps" in facts.config else {}
    return {**(train if isinstance(train, dict) else {}), **own}


def _data(seen: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Parts and images by their kind (shard, corpus, human), as data.json names them."""
    counts: dict[str, dict[str, int]] = {}
    for source in seen.get("sources", []):
        kind = counts.setdefault(source["kind"], {"parts": 0, "images": 0})
        kind["parts"] += 1
        kind["images"] += source["images"]
    return counts


def _round_of(path: Path) -> Round | None:
    """The round that a checkpoint's folder lies in, by its place in a workspace."""
    folder = path.parent
    if path.name not in ROUND_MODELS or folder.parent.name != "rounds" or not re.fullmatch(r"\d{4}", folder.name):
        return None
    return Workspace(folder.parent.parent).round(int(folder.name))


def _hub_name(source: str | Path, config: Mapping[str, Any]) -> str | None:
    """The hub's name of what is converted now, or was before."""
    for name in (str(source), str(config.get("source", ""))):
        if HUB_NAME.fullmatch(name) and not Path(name).exists():
            return name
    return None


def _began_with(config: Mapping[str, Any], made: Round | None) -> tuple[str, ...]:
    """The hub's names of what the first training of a chain began with; a file of the trainer's own has none."""
    start = config.get("start")
    if isinstance(start, str) and made is not None:
        folder = folder_of(Workspace(made.root.parent.parent), start)
        start = read_checkpoint_config(folder).get("start") if folder is not None else None
    if not isinstance(start, list | tuple) or len(start) != 2:
        return ()
    image, text = (str(name or "") for name in start)
    timm = "" if not image or "/" in image or Path(image).suffix in FILES else f"timm/{image}"
    bert = f"google-bert/{text}" if text.startswith("bert-") else text
    return tuple(name for name in (timm, bert) if HUB_NAME.fullmatch(name) and not Path(name).exists())


def _said(path: Path) -> dict[str, Any]:
    """INHERITED of the front matter of the card beside a checkpoint, whoever wrote it."""
    card = path / CARD
    if not path.is_dir() or not card.exists():
        return {}
    try:
        data = ModelCard(stores.read_bytes(card).decode(errors="replace"), ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, ValueError):
        return {}  # no front matter that the hub's library can read
    return {name: data[name] for name in INHERITED if data.get(name) is not None}
