"""BootstrapConfig: one model for the YAML file, the command line and the Prefect UI's form.

It composes the plain dataclasses that stand beside what they configure. Validated once, here; inside the
project plain values are passed on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from blip_core.capfilt.parts import AnnotateConfig
from blip_core.corpus.rules import PublishConfig
from blip_core.data.download import DownloadConfig
from blip_core.data.tables import PairTable, WebTable
from blip_core.errors import ConfigError
from blip_core.evaluation.gate import RoundsConfig
from blip_core.evaluation.protocol import EvaluationConfig
from blip_core.med.architecture import MEDConfig
from blip_core.med.decoding import GenerationConfig
from blip_core.med.word_pieces import TokenizerConfig
from blip_core.scale import Engine, ScaleConfig
from blip_core.settings import Settings, setting
from blip_core.training.recipe import TrainConfig, check_recipe

Section = TypeVar("Section", bound=Settings)

# What to do about the keys that have no default.
HINTS = {
    "web": "; name the table of URLs by web.path, or for capfilt clean by --urls TABLE",
    "workspace": "; name a folder to write to, here or by --workspace",
}


@dataclass(frozen=True)
class Checkpoints(Settings):
    """Models that are given, not trained."""

    captioner: str | None = setting(
        None, "a Captioner's checkpoint: a folder, a .pth file, or a name on the hub; null: the round's own"
    )
    filter: str | None = setting(
        None, "a Filter's checkpoint: a folder, a .pth file, or a name on the hub; null: the round's own"
    )
    tokenizer: str | None = setting(
        None, "word pieces for .pth files, which bring none: a folder, or a name on the hub; null: bert-base-uncased"
    )


class BootstrapConfig(BaseModel):
    """Everything that one round of bootstrapping needs to know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workspace: str = Field(
        description="folder that everything is written to, or a URL such as s3://bucket/work", min_length=1
    )
    round: int = Field(1, description="number of the round", ge=1, le=9999)
    seed: int = Field(0, description="decides weights, order and sampling", ge=0, lt=2**31)
    workspace_url: str | None = Field(
        None,
        description="http address under which the workspace can be read, for links to reports; null: none",
        pattern="^https?://",
    )
    engine: Engine = Field(
        "local", description="who does the work: this process, a Prefect work pool, or a Ray cluster"
    )
    scale: ScaleConfig = Field(ScaleConfig(), description="how the engines pool and ray share out the work")
    web: WebTable = Field(description="the web pairs: URLs and their web texts")
    human: PairTable | None = Field(None, description="the human pairs, which every training but `clean` needs")
    held_out: PairTable | None = Field(None, description="human pairs to evaluate on, never trained on")
    truth: str | None = Field(None, description="known truth of synthetic scenes, read by the audit alone")
    download: DownloadConfig = Field(DownloadConfig(), description="how images are fetched")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="the word pieces")
    med: MEDConfig = Field(MEDConfig(), description="the sizes of the model")
    pretrain: TrainConfig = Field(TrainConfig(), description="pre-training on web and human pairs")
    captioner: TrainConfig = Field(TrainConfig(), description="fine-tuning of the Captioner on human pairs")
    filter: TrainConfig = Field(TrainConfig(), description="fine-tuning of the Filter on human pairs")
    retrain: TrainConfig = Field(TrainConfig(), description="training from scratch on corpus and human pairs")
    compare_raw: bool = Field(True, description="train the same budget on the raw web pairs too, to compare with")
    generation: GenerationConfig = Field(GenerationConfig(), description="how synthetic texts are decoded")
    annotate: AnnotateConfig = Field(AnnotateConfig(), description="captioning and scoring of the shards")
    publish: PublishConfig = Field(PublishConfig(), description="what the corpus keeps")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="evaluation on the held-out pairs")
    checkpoints: Checkpoints = Field(Checkpoints(), description="models that are given, not trained")
    rounds: RoundsConfig = Field(RoundsConfig(), description="how re-bootstrap makes rounds, and judges them")


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> BootstrapConfig:
    """Reads a YAML file into a BootstrapConfig.

    Relative paths of tables, truth and checkpoints are read from the file's folder, the workspace's from the
    current one.

    Args:
        path: the YAML file.
        overrides: values by dotted key, such as {"pretrain.steps": "500"}; strings are read as YAML.

    Raises ConfigError, naming file and key, for a missing or unreadable file, an unknown key or a bad value.
    """
    values = read_values(path)
    for key, value in (overrides or {}).items():
        _set(values, key, _read_yaml(value, f"{key}: {value!r:.80}") if isinstance(value, str) else value)
    _resolve_paths(values, path.resolve().parent)
    return parse_config(values, str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The values of a YAML file as they stand. Raises ConfigError where it cannot be read or is no mapping."""
    try:
        values = _read_yaml(path.read_text(encoding="utf-8"), f"configuration {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path}: must be a mapping of keys to values")
    return values


def _read_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: cannot be read as YAML ({' '.join(str(error).split())})") from error


def parse_config(values: Mapping[str, Any], origin: str = "configuration") -> BootstrapConfig:
    """Validates plain values. Raises ConfigError naming the keys that are wrong and why."""
    try:
        config = BootstrapConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: {'; '.join(_explain(problem) for problem in error.errors())}") from error
    config.med.architecture()
    for name in ("pretrain", "captioner", "filter", "retrain"):
        check_recipe(name, getattr(config, name))
    return config


def parse_section(section: type[Section], values: Mapping[str, Any]) -> Section:
    """One section's settings by themselves, validated. Raises ConfigError naming the keys that are wrong and why."""
    try:
        return TypeAdapter(section).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: unknown key; the keys there are {_known_keys(problem['loc'][:-1])}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key}: missing, and it has no default{HINTS.get(key, '')}"
    return f"{key}: {problem['msg'][:1].lower()}{problem['msg'][1:]} (found {problem['input']!r:.80})"


def _known_keys(section: tuple[Any, ...]) -> str:
    known: Any = BootstrapConfig.model_json_schema()
    definitions = known["$defs"]
    for part in section:
        known = known.get("properties", {}).get(part, {})
        reference = next((option["$ref"] for option in [known, *known.get("anyOf", [])] if "$ref" in option), "")
        known = definitions.get(reference.rpartition("/")[2], known)
    return ", ".join(known.get("properties", {}))


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section of settings")
        values = inner
    values[last] = value


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Makes relative paths absolute, from the configuration's folder."""
    for section in ("web", "human", "held_out"):
        _resolve(values.get(section), ["path"], folder)
    _resolve(values, ["truth"], folder)
    _resolve(values.get("checkpoints"), ["captioner", "filter", "tokenizer"], folder, or_name=True)
    _resolve(values.get("med"), ["image_weights", "text_weights"], folder, or_name=True)
    _resolve(values.get("tokenizer"), ["source"], folder, or_name=True)


def _resolve(section: Any, keys: list[str], folder: Path, or_name: bool = False) -> None:
    """`or_name`: a value may be a name on a hub as well; it is a path where there is such a file or folder."""
    if not isinstance(section, dict):
        return
    for key in section.keys() & set(keys):
        value = section[key]
        if isinstance(value, list):
            section[key] = [_resolved(one, folder, or_name) for one in value]
        else:
            section[key] = _resolved(value, folder, or_name)


def _resolved(value: Any, folder: Path, or_name: bool) -> Any:
    if not isinstance(value, str) or "://" in value:
        return value
    path = folder / Path(value).expanduser()
    return str(path) if path.exists() or not or_name else value
