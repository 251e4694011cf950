"""The documents are true: their commands exist, their configurations parse, their SQL runs, their tables are whole."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from services.filters import save_filter

from blip_core.config import BootstrapConfig, parse_config
from blip_core.corpus.catalog import VIEW_MEANINGS, build_catalog
from blip_core.corpus.macros import MACROS
from blip_core.corpus.query import run_query
from blip_core.corpus.schemas import (
    ANNOTATION_SCHEMA,
    ANNOTATION_VERSION,
    CORPUS_SCHEMA,
    EMBEDDING_VERSION,
    FILTER_KEY,
    embedding_schema,
    part_writer,
    write_part,
)
from blip_core.corpus.selection import check_predicate, publish_shard
from blip_core.data.shards import REASONS, SHARD_SCHEMA, write_shard
from blip_core.evaluation.report import STEPS, build_report
from blip_core.training.metrics import Measured, MetricsLog
from blip_core.workspace import Workspace
from flows.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SHORTHANDS = {"held_out": "human", "captioner": "pretrain", "filter": "pretrain", "retrain": "pretrain"}
"""Sections of the configuration whose keys are told once, under another section."""


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in all documents; the SQL of sql.md has answers and tests of its own."""
    text = "\n".join(text for name, text in DOCUMENTS.items() if (language, name) != ("sql", "sql.md"))
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def shell_commands(program: str) -> list[list[str]]:
    """The words of every command of a program in the documents' shell blocks."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] == program]


QUERIES = [word for words in shell_commands("capfilt") if words[1] == "query" for word in words if " " in word]
CONFIGURATIONS = {block.split()[1].rstrip(":"): block for block in blocks("yaml") if re.match(r"# \S+\.yaml: ", block)}


def table(document: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head; code marks are taken away."""
    section = re.split(r"^#+ ", DOCUMENTS[document].split(f"# {heading}\n", 1)[1], flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in rows[2:]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose parts are valid and have no rows."""
    made = Workspace.open(tmp_path_factory.mktemp("empty") / "work")
    made.shards.mkdir()
    write_shard(made.shard("0" * 16), [], "0", rows=0)
    round_1 = made.round(1)
    write_part(round_1.annotations / f"{'0' * 16}.parquet", ANNOTATION_SCHEMA.empty_table(), ANNOTATION_VERSION, "0")
    part = f"{'0' * 16}.parquet"
    publish_shard(round_1.annotations / part, made.shards / part, round_1.corpus / part, "itm_score > 0.5", 1)
    vectors = embedding_schema(16).empty_table()
    with part_writer(
        round_1.embeddings / part, vectors.schema, EMBEDDING_VERSION, "0", {FILTER_KEY: save_filter(round_1.filter)}
    ) as writer:
        writer.write(vectors)
    build_catalog(made)
    return made


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_help_and_stands_in_the_readme(name: str) -> None:
    assert COMMANDS[name].help
    assert [parameter.name for parameter in COMMANDS[name].params if not parameter.help] == []
    assert re.search(rf"^\| `capfilt {name}\b[^`]*` \| \S", README, re.MULTILINE)


def test_the_readme_names_no_command_that_there_is_not() -> None:
    assert set(re.findall(r"^\| `capfilt ([a-z-]+)", README, re.MULTILINE)) == set(COMMANDS)


def test_documented_commands_use_options_that_there_are() -> None:
    commands = shell_commands("capfilt")
    assert {words[1] for words in commands} >= {"query", "publish", "report"}
    for _, name, *words in commands:
        options = {
            option for parameter in COMMANDS[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, words
        for setting in (words[place + 1] for place, word in enumerate(words) if word == "--set"):
            key, _, value = setting.partition("=")
            assert key in configuration_keys()
            if key == "publish.where":
                check_predicate(yaml.safe_load(value))


def test_make_targets_of_the_readme_are_in_the_makefile() -> None:
    targets = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"`[^`\n]+`", README) + blocks("bash"))))
    assert {"demo", "test"} <= targets
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_documented_configuration_parses(name: str) -> None:
    config = parse_config(yaml.safe_load(CONFIGURATIONS[name]), name)
    check_predicate(config.publish.where)
    assert config.model_dump(exclude_unset=True).keys() == yaml.safe_load(CONFIGURATIONS[name]).keys()


def test_documented_configurations_show_every_section() -> None:
    assert len(CONFIGURATIONS) >= 2
    shown = set().union(*(yaml.safe_load(block) for block in CONFIGURATIONS.values()))
    assert shown == set(BootstrapConfig.model_fields)


def test_documented_prefect_parameters_parse_and_name_a_deployment() -> None:
    runs = [words for words in shell_commands("prefect") if words[1:3] == ["deployment", "run"]]
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert runs
    for words in runs:
        flow, deployment = words[3].split("/")
        assert deployment == "capfilt"
        assert f"flows.{flow}.{flow}" in {entry["entrypoint"] for entry in deployed}
        parse_config(json.loads(words[words.index("--params") + 1])["config"])


@pytest.mark.parametrize("sql", [*blocks("sql"), *QUERIES])
def test_documented_sql_runs(sql: str, workspace: Workspace) -> None:
    assert run_query(workspace, sql).num_rows == 0


def test_documented_sql_runs_in_duckdb_alone(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.root)
    statements = re.findall(r'duckdb\.sql\("(.*)"\)', "\n".join(blocks("python")))
    assert statements
    for statement in statements:
        assert duckdb.sql(statement).columns == CORPUS_SCHEMA.names
    with duckdb.connect("catalog.duckdb", read_only=True) as connection:
        for statement in blocks("sql"):
            assert connection.sql(statement).columns


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        ("Shards", SHARD_SCHEMA),
        ("Annotations", ANNOTATION_SCHEMA),
        ("Embeddings", embedding_schema(256)),
        ("Corpus", CORPUS_SCHEMA),
    ],
)
def test_documented_columns_are_those_of_the_schema(heading: str, schema: pa.Schema) -> None:
    documented = [(name, kind) for name, kind, *_ in table("workspace.md", heading)]
    assert documented == [(field.name, str(field.type)) for field in schema]


def test_documented_reasons_are_the_closed_list() -> None:
    assert dict(table("workspace.md", "Reasons")) == REASONS


def test_documented_keys_of_report_seconds_metrics_and_views_are_those_that_are_written(
    workspace: Workspace, tmp_path: Path
) -> None:
    assert [row[0] for row in table("workspace.md", "The report as JSON")] == list(build_report(workspace, 1))
    log = MetricsLog(tmp_path / "metrics.jsonl", "med", 0)
    log.write(1, {"itc": 1.0}, Measured(0.1, 1.0, 2.0, 0.0, 0))
    assert [row[0] for row in table("workspace.md", "Training metrics")] == list(json.loads(log.path.read_text()))
    assert [row[0] for row in table("workspace.md", "The catalog")] == list(VIEW_MEANINGS)
    seconds = DOCUMENTS["workspace.md"].split("# seconds.json\n")[1].split("\n#")[0]
    assert re.findall(r"`(\w+)`", seconds) == list(STEPS)


def test_documented_macros_are_the_catalogs_with_their_parameters() -> None:
    assert [row[0] for row in table("search.md", "Search")] == [
        f"{name}({macro.parameters})" for name, macro in MACROS.items()
    ]


def test_the_corpus_metadata_is_as_documented(workspace: Workspace) -> None:
    (part,) = workspace.round(1).corpus.glob("*.parquet")
    keys = {key.decode() for key in pq.read_schema(part).metadata if key.startswith(b"capfilt.")}
    assert "capfilt.where" in keys
    assert {key for key in keys if f"`{key}`" not in DOCUMENTS["workspace.md"]} == set()


def configuration_keys() -> dict[str, dict[str, Any]]:
    """The schema of every key of the configuration, by dotted name."""
    schema = BootstrapConfig.model_json_schema()
    return dict(_keys(schema, schema["$defs"], ""))


def _keys(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        options = [field, *field.get("anyOf", [])]
        section = next((option["$ref"] for option in options if "$ref" in option), None)
        if section:
            yield from _keys(definitions[section.rpartition("/")[2]], definitions, f"{path}{name}.")
        else:
            yield f"{path}{name}", {**next(o for o in options if "type" in o), **field, "required": name in required}


def configuration_rows() -> list[str]:
    """The table of docs/configuration.md, as the schema has it."""
    rows = []
    for key, field in configuration_keys().items():
        if key.partition(".")[0] not in SHORTHANDS:
            default = "" if field["required"] else f"`{json.dumps(field.get('default'))}`"
            rows.append(f"| `{key}` | {default} | {_allowed(field)} | {field['description']} |")
    return rows


def _allowed(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " and ".join(f"{sign} {field[bound]:,}" for bound, sign in signs.items() if bound in field)


def test_the_documented_configuration_is_the_schemas() -> None:
    documented = [line for line in DOCUMENTS["configuration.md"].splitlines() if line.startswith("| `")]
    assert documented == configuration_rows()
    keys = configuration_keys()
    for section, told in SHORTHANDS.items():
        assert {key.partition(".")[2] for key in keys if key.startswith(f"{section}.")} == {
            key.partition(".")[2] for key in keys if key.startswith(f"{told}.")
        }


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_between_documents_lead_somewhere(name: str) -> None:
    folder = ROOT if name == "README.md" else ROOT / "docs"
    targets = re.findall(r"(?<!!)\[[^\]]*\]\((?!https?://)([^)#]+)", DOCUMENTS[name])
    assert [target for target in targets if not (folder / target).exists()] == []
