"""What a training saw stands beside its weights, and leads from an image to the models and back."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_core.corpus.explain import explain
from blip_core.corpus.forget import forget
from blip_core.corpus.names import parse_names
from blip_core.corpus.schemas import ANNOTATION_SCHEMA, ANNOTATION_VERSION, write_part
from blip_core.corpus.selection import publish_human, publish_shard
from blip_core.data.pairs import PairSource, corpus_sources, human_sources, pairs_digest, web_sources
from blip_core.data.shards import SHARD_SCHEMA, read_shard, write_shard
from blip_core.data.tables import PairTable
from blip_core.med.architecture import MEDConfig
from blip_core.med.description import read_checkpoint_config
from blip_core.med.word_pieces import TokenizerConfig
from blip_core.training.finetune import finetune_filter
from blip_core.training.pretrain import pretrain
from blip_core.training.recipe import TrainConfig
from blip_core.workspace import Workspace

CONFIG = TrainConfig(steps=1, batch_size=4, learning_rate=1e-3, warmup_steps=0, queue_size=8, save_every=9, log_every=1)
NAME = "a0a0a0a0a0a0a0a0"


def make(
    root: Path, sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig
) -> tuple[Workspace, PairTable]:
    """A round of real trainings: a MED and its Filter, and one on the corpus, which has half of the images."""
    workspace, pairs = Workspace.open(root / "workspace"), pq.read_table(sources[0].path).to_pylist()
    images = [row["image"] for row in pairs]
    rows = [
        {"uid": f"w{n:02d}", "url": f"http://web.test/{n}", "caption": f"a {n}", "status": "ok", "image": image}
        | {"width": 20, "height": 20, "original_width": 20, "original_height": 20}
        | {"sha256": hashlib.sha256(image).hexdigest()}
        for n, image in enumerate(images[:10])
    ]
    workspace.shards.mkdir()
    write_shard(workspace.shard(NAME), [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "0", len(rows))
    scored = [
        {"uid": row["uid"], "shard": NAME, "url": row["url"], "image_sha256": row["sha256"], "text": row["caption"]}
        | {"source": "web", "candidate": 0, "itm_score": 0.9 if number < 5 else 0.1}
        for number, row in enumerate(rows)
    ]
    made = workspace.round(1)
    part = made.annotations / f"{NAME}.parquet"
    write_part(part, pa.Table.from_pylist(scored, ANNOTATION_SCHEMA), ANNOTATION_VERSION, "0")
    publish_shard(part, workspace.shard(NAME), made.corpus / part.name, "itm_score > 0.5", 1)
    human = PairTable(str(root / "human.parquet"))
    pq.write_table(pa.table({"image": images[10:], "caption": ["a human text", "another one"]}), human.path)
    publish_human(human, made.corpus, 1)
    for target, web in (
        (made.med, web_sources(workspace.shard_paths())),
        (made.retrained, corpus_sources(made.corpus, workspace.shards)),
    ):
        metrics = made.metrics / f"{target.name}.jsonl"
        pretrain(target, [*web, *human_sources(human)], sizes, CONFIG, words, 1, metrics, round=1)
    finetune = replace(CONFIG, batch_size=2)
    finetune_filter(made.filter, made.med, human_sources(human), finetune, 1, made.metrics / "filter.jsonl", round=1)
    return workspace, human


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, sources: list[PairSource], sizes: MEDConfig, words: TokenizerConfig
) -> tuple[Workspace, PairTable]:
    return make(tmp_path_factory.mktemp("trained"), sources, sizes, words)


def record(folder: Path) -> dict:
    return json.loads((folder / "data.json").read_text())


def test_a_checkpoint_names_its_shards_and_its_human_pairs_with_what_they_held(
    trained: tuple[Workspace, PairTable],
) -> None:
    workspace, human = trained
    found = record(workspace.round(1).med)
    assert (found["schema"], found["round"]) == ("data/1", 1)
    web, pairs = found["sources"]
    assert (web["kind"], web["name"], web["images"]) == ("shard", NAME, 10)
    assert (pairs["kind"], pairs["name"], pairs["images"]) == ("human", "human.parquet", 2)
    content = "".join(f"{row['sha256']}{row['caption']}\n" for row in read_shard(workspace.shard(NAME)).to_pylist())
    assert web["digest"] == hashlib.sha256(content.encode()).hexdigest()[:16]
    rows = pq.read_table(human.path).to_pylist()
    own = b"".join(row["image"] + row["caption"].encode() + b"\n" for row in rows)
    assert pairs["digest"] == hashlib.sha256(own).hexdigest()[:16]
    assert found["digest"] == hashlib.sha256(content.encode() + own).hexdigest()[:16]
    corpus, _ = record(workspace.round(1).retrained)["sources"]
    assert (corpus["kind"], corpus["name"], corpus["images"]) == ("corpus", NAME, 5)
    assert [source["kind"] for source in record(workspace.round(1).filter)["sources"]] == ["human"]


def test_the_record_has_the_same_bytes_wherever_the_data_lie(
    trained: tuple[Workspace, PairTable],
    tmp_path: Path,
    sources: list[PairSource],
    sizes: MEDConfig,
    words: TokenizerConfig,
) -> None:
    again, _ = make(tmp_path / "elsewhere", sources, sizes, words)
    for name in ("med", "filter", "retrained"):
        theirs = getattr(trained[0].round(1), name) / "data.json"
        assert (getattr(again.round(1), name) / "data.json").read_bytes() == theirs.read_bytes()


def test_a_checkpoint_stands_by_its_fingerprint_with_a_record_or_without(
    trained: tuple[Workspace, PairTable], tmp_path: Path, sizes: MEDConfig, words: TokenizerConfig
) -> None:
    shutil.copytree(trained[0].root, tmp_path / "copy")
    workspace = Workspace.open(tmp_path / "copy")
    made = workspace.round(1)
    sources = [*web_sources(workspace.shard_paths()), *human_sources(trained[1])]
    assert read_checkpoint_config(made.med)["data"] == pairs_digest(sources)
    (made.med / "data.json").unlink()
    for number in (1, 2):
        metrics = made.metrics / "med.jsonl"
        assert pretrain(made.med, sources, sizes, CONFIG, words, 1, metrics, round=number).skipped


def test_an_image_leads_to_the_models_that_were_trained_on_it(trained: tuple[Workspace, PairTable]) -> None:
    workspace, human = trained
    made = workspace.round(1)
    med, filter, retrained = (
        read_checkpoint_config(folder)["digest"] for folder in (made.med, made.filter, made.retrained)
    )
    began = {med: "web pairs", filter: f"began with {med}"}
    story = explain(workspace, "w01")
    assert story["trained"] == {**began, retrained: "corpus"}
    assert story["models"][retrained]["kind"] == "retrained"
    assert explain(workspace, "w07")["trained"] == began  # it is not in the corpus
    digest = hashlib.sha256(pq.read_table(human.path)["image"][0].as_py()).hexdigest()
    assert explain(workspace, digest)["trained"] == dict.fromkeys((med, filter, retrained), "human pairs")


def test_forgetting_lists_those_models_and_the_next_training_sees_the_rest(
    trained: tuple[Workspace, PairTable], tmp_path: Path, sizes: MEDConfig, words: TokenizerConfig
) -> None:
    shutil.copytree(trained[0].root, tmp_path / "copy")
    workspace = Workspace.open(tmp_path / "copy")
    made = workspace.round(1)
    found = forget(workspace, parse_names(["http://web.test/1"]))
    assert [model["kind"] for model in found.checkpoints] == ["med", "filter", "retrained"]
    sources = [*corpus_sources(made.corpus, workspace.shards), *human_sources(trained[1])]
    metrics = made.metrics / "retrained.jsonl"
    assert not pretrain(made.retrained, sources, sizes, CONFIG, words, 1, metrics, round=1).skipped
    assert record(made.retrained)["sources"][0]["images"] == 4
    assert [model["kind"] for model in forget(workspace).checkpoints] == ["med", "filter"]


def test_a_corpus_that_was_published_anew_does_not_say_what_its_model_saw(
    trained: tuple[Workspace, PairTable], tmp_path: Path
) -> None:
    shutil.copytree(trained[0].root, tmp_path / "copy")
    workspace = Workspace.open(tmp_path / "copy")
    made = workspace.round(1)
    part = made.annotations / f"{NAME}.parquet"
    publish_shard(part, workspace.shard(NAME), made.corpus / part.name, "itm_score > 0.95", 1)
    retrained = read_checkpoint_config(made.retrained)["digest"]
    assert explain(workspace, "w01")["trained"][retrained] == "corpus, published anew since"
