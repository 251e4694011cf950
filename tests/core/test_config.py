"""The configuration: one key wrong is one message that names it, and the schema explains every field."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from blip_core.config import BootstrapConfig, load_config, parse_config, parse_section
from blip_core.errors import ConfigError
from blip_core.med.architecture import MEDConfig
from blip_core.med.decoding import GenerationConfig
from blip_core.training.recipe import TrainConfig

SMALLEST = {"workspace": "work", "web": {"path": "urls.parquet"}}


def write(folder: Path, values: Any) -> Path:
    path = folder / "round.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def test_what_is_not_said_has_its_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALLEST))
    assert config.pretrain == TrainConfig()
    assert config.med == MEDConfig()
    assert (config.round, config.seed, config.human, config.held_out) == (1, 0, None, None)
    assert config.publish.where == "itm_score > 0.5"
    assert config.checkpoints.filter is None


def test_sections_become_the_dataclasses_beside_what_they_configure(tmp_path: Path) -> None:
    values = {**SMALLEST, "pretrain": {"steps": 5, "precision": "bf16"}, "med": {"preset": "tiny", "image_size": 32}}
    config = load_config(write(tmp_path, values))
    assert config.pretrain == TrainConfig(steps=5, precision="bf16")
    assert config.med.architecture().image_size == 32


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sed": 1}, r"round\.yaml: sed: unknown key; the keys there are workspace, round, seed"),
        ({"pretrain": {"step": 1}}, r"pretrain\.step: unknown key; the keys there are steps, batch_size"),
        ({"human": {"path": "h", "img": 1}}, r"human\.img: unknown key; the keys there are path, image, caption"),
        ({"pretrain": {"steps": 0}}, r"pretrain\.steps: .*greater than or equal to 1 \(found 0\)"),
        ({"pretrain": {"steps": "many"}}, r"pretrain\.steps: .*integer.*\(found 'many'\)"),
        ({"generation": {"p": 1.5}}, r"generation\.p: .*less than or equal to 1 \(found 1\.5\)"),
        ({"generation": {"method": "best"}}, r"generation\.method: .*'nucleus', 'beam' or 'greedy'"),
        ({"pretrain": {"learning_rate": float("nan")}}, r"pretrain\.learning_rate: "),
        ({"web": {}}, r"web\.path: missing, and it has no default"),
        ({"web": None}, r"web: "),
        ({"pretrain": 7}, r"pretrain: .*found 7"),
        ({"med": {"text_heads": 5}}, r"med\.text_width 768 must be a multiple of med\.text_heads 5"),
        ({"round": 0}, r"round: .*greater than or equal to 1"),
        ({"workspace": ""}, r"workspace: "),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(write(tmp_path, {**SMALLEST, **section}))
    assert "\n" not in str(raised.value)


def test_missing_keys_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"workspace: missing.*; web: missing"):
        parse_config({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("workspace: [", r"round\.yaml: cannot be read as YAML"),
        ("- a\n- b\n", r"round\.yaml: must be a mapping of keys to values"),
        ("", r"round\.yaml: must be a mapping"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, content))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
        load_config(tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"workspace: \xe4\xff")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read"):
        load_config(tmp_path / "latin.yaml")


def test_overrides_reach_any_depth_and_are_read_as_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, {**SMALLEST, "pretrain": {"steps": 5}})
    overrides = {
        "seed": "7",
        "pretrain.steps": "50",
        "pretrain.flip": "no",
        "generation.method": "beam",
        "human.path": "/data/h.parquet",
        "web.caption": "TEXT",
        "med.dropout": 0.0,
        "publish.where": "itm_score > 0.9 and source = 'web'",
    }
    config = load_config(path, overrides)
    assert (config.seed, config.pretrain.steps, config.pretrain.flip) == (7, 50, False)
    assert config.human is not None
    assert (config.generation.method, config.human.path, config.web.caption) == ("beam", "/data/h.parquet", "TEXT")
    assert config.med.dropout == 0.0
    assert config.publish.where == "itm_score > 0.9 and source = 'web'"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pretrain.step", "1", r"pretrain\.step: unknown key"),
        ("pretrain.steps", "-1", r"pretrain\.steps: "),
        ("workspace.folder", "x", r"workspace\.folder: workspace is a value, not a section of settings"),
        ("nothing.at.all", "x", r"nothing: unknown key"),
        ("pretrain.steps", "[1", r"pretrain\.steps: .*cannot be read as YAML"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, SMALLEST), {key: value})


def test_relative_paths_begin_at_the_file_and_the_workspace_at_the_current_folder(tmp_path: Path) -> None:
    values = {
        "workspace": "work",
        "web": {"path": "data/urls.parquet"},
        "human": {"path": "/elsewhere/human.parquet"},
        "held_out": {"path": "../held.parquet"},
        "truth": "truth.parquet",
        "checkpoints": {"captioner": "models/c", "filter": None},
    }
    config = load_config(write(tmp_path, values))
    assert config.workspace == "work"
    assert config.web.path == str(tmp_path / "data" / "urls.parquet")
    assert config.human is not None
    assert config.human.path == "/elsewhere/human.parquet"
    assert config.held_out is not None
    assert Path(config.held_out.path).resolve() == tmp_path.parent.resolve() / "held.parquet"
    assert config.truth == str(tmp_path / "truth.parquet")
    # what is not there may be a name on the hub
    assert (config.checkpoints.captioner, config.checkpoints.filter) == ("models/c", None)
    (tmp_path / "models" / "c").mkdir(parents=True)
    config = load_config(write(tmp_path, values))
    assert (config.checkpoints.captioner, config.checkpoints.filter) == (str(tmp_path / "models" / "c"), None)
    remote = {**SMALLEST, "web": {"path": "s3://bucket/urls.parquet"}}
    assert load_config(write(tmp_path, remote)).web.path == "s3://bucket/urls.parquet"
    several = {**SMALLEST, "web": {"path": ["urls/*.csv", "s3://bucket/more", "/else/a.tsv"]}}
    found = load_config(write(tmp_path, several)).web
    assert found.path == found.paths == (f"{tmp_path}/urls/*.csv", "s3://bucket/more", "/else/a.tsv")


def test_a_configuration_survives_the_way_through_json() -> None:
    config = parse_config({**SMALLEST, "med": {"preset": "small"}, "human": {"path": "h.parquet"}})
    assert parse_config(config.model_dump(mode="json")) == config


def _fields(
    schema: dict[str, Any], definitions: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in schema.get("properties", {}).items():
        yield f"{path}{name}", field
        for option in [field, *field.get("anyOf", []), *field.get("allOf", [])]:
            if "$ref" in option:
                yield from _fields(definitions[option["$ref"].rpartition("/")[2]], definitions, f"{path}{name}.")


def test_the_schema_describes_and_bounds_every_field() -> None:
    schema = BootstrapConfig.model_json_schema()
    fields = dict(_fields(schema, schema["$defs"]))
    assert {"pretrain.steps", "retrain.flip", "human.image", "med.dropout", "evaluation.rerank"} <= fields.keys()
    assert [path for path, field in fields.items() if not field.get("description")] == []
    bounds = ("minimum", "exclusiveMinimum")
    unbounded = [
        path
        for path, field in fields.items()
        for option in [field, *field.get("anyOf", [])]
        if option.get("type") in ("integer", "number") and not any(bound in option for bound in bounds)
    ]
    assert unbounded == []
    assert fields["pretrain.batch_size"]["minimum"] == 2
    assert fields["generation.method"]["enum"] == ["nucleus", "beam", "greedy"]


def test_one_section_is_validated_by_itself_as_within_the_whole() -> None:
    assert parse_section(GenerationConfig, {"p": 0.5, "max_length": 7}) == GenerationConfig(p=0.5, max_length=7)
    with pytest.raises(ConfigError, match=r"p: .*greater than 0 \(found 0\.0\); beams: "):
        parse_section(GenerationConfig, {"p": 0.0, "beams": 0})


def test_a_configuration_without_a_table_or_a_workspace_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match=r"workspace: missing.*--workspace; web: missing.*web\.path.*--urls TABLE"):
        parse_config({})
