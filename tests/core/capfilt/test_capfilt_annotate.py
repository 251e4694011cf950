"""CapFilt over a shard made by hand, with random models: every row, score and seed is worked out again one by one."""

import hashlib
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from blip_core.capfilt.annotate import annotate_shard
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig
from blip_core.corpus.schemas import ANNOTATION_SCHEMA
from blip_core.data.shards import SHARD_SCHEMA, check_part, write_shard
from blip_core.data.transforms import eval_transform
from blip_core.errors import ShardError
from blip_core.med.checkpoint import load_med
from blip_core.med.convert import write_transformers
from blip_core.med.decoding import GenerationConfig
from blip_core.med.generation import CachedDecoder, caption_seed, row_uniforms, sample

NAME = "c0ffee0000000001"
CONFIG = AnnotateConfig(candidates=2, batch_size=3, workers=0)
GENERATION = GenerationConfig(p=0.95, max_length=6, min_length=2)
CAPTIONS = ["a red circle", "buy cheap shoes", "", "two green rings", None, "a star", "a blue square"]


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (18, 22, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Seven images, the sixth of which cannot be decoded, between two failed downloads."""
    rows: list[dict[str, Any]] = [{"uid": "a0", "url": "http://x/0", "status": "failed", "reason": "dns"}]
    for number, caption in enumerate(CAPTIONS, start=1):
        image = picture(number) if number != 6 else picture(number)[:60]
        rows.append(
            {"uid": f"a{number}", "url": f"http://x/{number}", "caption": caption, "status": "ok", "image": image}
            | {"sha256": hashlib.sha256(image).hexdigest()}
        )
    rows.append({"uid": "a8", "caption": "gone", "status": "failed", "reason": "not_found"})
    path = tmp_path / "shards" / f"{NAME}.parquet"
    write_shard(path, [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", len(rows))
    return path


def annotate(
    shard: Path,
    target: Path,
    models: tuple[Captioner, Filter],
    config: AnnotateConfig = CONFIG,
    generation: GenerationConfig = GENERATION,
    seed: int = 0,
) -> list[dict[str, Any]]:
    summary = annotate_shard(shard, target, *models, config, generation, seed)
    assert not summary.skipped
    return pq.read_table(target).to_pylist()


def test_every_image_has_its_web_text_and_its_synthetic_texts_in_order(
    shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    target = tmp_path / "annotations" / shard.name
    rows = annotate(shard, target, models)
    assert [(row["uid"], row["candidate"]) for row in rows] == [(f"a{n}", k) for n in range(1, 8) for k in range(3)]
    assert [row["source"] for row in rows] == ["web", "synthetic", "synthetic"] * 7
    assert [row["text"] for row in rows[::3]] == [caption or "" for caption in CAPTIONS]
    assert {row["shard"] for row in rows} == {NAME}
    assert {row["url"] for row in rows if row["uid"] == "a4"} == {"http://x/4"}
    assert {(row["captioner"], row["filter"]) for row in rows} == {(models[0].digest, models[1].digest)}
    assert pq.read_schema(target).remove_metadata().equals(ANNOTATION_SCHEMA)


def test_a_part_s_metadata_say_what_made_it_and_how_much_it_holds(
    shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    summary = annotate_shard(shard, tmp_path / "part.parquet", *models, CONFIG, GENERATION, 0)
    metadata = check_part(tmp_path / "part.parquet", "annotation/1")
    assert len(metadata.pop("capfilt.fingerprint")) == 16
    assert metadata == {
        "capfilt.schema": "annotation/1",
        "capfilt.captioner": models[0].digest,
        "capfilt.filter": models[1].digest,
        "capfilt.precision": "fp32",
        "capfilt.generation": json.dumps(asdict(GENERATION), sort_keys=True),
        "capfilt.images": "7",
        "capfilt.rows": "21",
        "capfilt.unscored": str(summary.unscored),
    }


def test_a_standing_part_is_summed_up_without_reading_its_columns(
    shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    target = tmp_path / "part.parquet"
    first = annotate_shard(shard, target, *models, CONFIG, GENERATION, 0)
    data = target.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    target.write_bytes(b"PAR1" + bytes(len(data) - footer - 4) + data[-footer:])
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(target)
    again = annotate_shard(shard, target, *models, CONFIG, GENERATION, 0)
    assert again == first._replace(skipped=True, seconds=0.0, waited=0.0)


@pytest.mark.parametrize("uids", [["b", "a"], ["a", "a"], ["a", None]])
def test_a_shard_that_is_not_sorted_is_refused(
    uids: list[str | None], tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    rows = [{"uid": uid, "caption": "x", "status": "ok", "sha256": "0", "image": picture(1)} for uid in uids]
    write_shard(tmp_path / "odd.parquet", [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", 2)
    with pytest.raises(ShardError, match=r"odd\.parquet: uid .* comes after '.'; a shard has every uid once, sorted"):
        annotate_shard(tmp_path / "odd.parquet", tmp_path / "part.parquet", *models, CONFIG, GENERATION, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.parquet"]


def test_the_summary_counts_what_was_written(shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]) -> None:
    summary = annotate_shard(shard, tmp_path / "part.parquet", *models, CONFIG, GENERATION, 0)
    # two empty web texts, and all three texts of the image that cannot be decoded
    assert (summary.shard, summary.images, summary.candidates, summary.unscored) == (NAME, 7, 21, 5)


def test_a_text_without_scores_says_why(shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]) -> None:
    rows = annotate(shard, tmp_path / "part.parquet", models)
    reasons = {(row["uid"], row["candidate"]): row["reason"] for row in rows if row["reason"] is not None}
    unreadable = {("a6", candidate): "truncated" for candidate in range(3)}
    assert reasons == {("a3", 0): "empty_text", ("a5", 0): "empty_text", **unreadable}
    for row in rows:
        assert (row["itm_score"] is None) == (row["itc_score"] is None) == (row["reason"] is not None)
        assert (row["logprob"] is None) == (row["source"] == "web" or row["reason"] == "truncated")
        assert (row["seed"] is None) == (row["source"] == "web")


@torch.inference_mode()
def test_texts_and_scores_equal_those_of_each_pair_alone(
    shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    captioner, filter = models
    images = {row["uid"]: row["image"] for row in pq.read_table(shard).to_pylist()}
    for row in annotate(shard, tmp_path / "part.parquet", models, seed=11):
        if row["reason"] is not None:
            continue
        image = Image.open(io.BytesIO(images[row["uid"]]))
        assert row["image_sha256"] == hashlib.sha256(images[row["uid"]]).hexdigest()
        if row["source"] == "synthetic":
            assert row["seed"] == caption_seed(11, row["image_sha256"], row["candidate"])
            words = captioner.tokenizer
            features = captioner.med.encode_image(eval_transform(16)(image)[None])
            decoder = CachedDecoder(captioner.med, captioner.med.cross_keys(features))
            uniforms = row_uniforms(row["seed"], GENERATION.max_length)[None]
            [caption] = sample(decoder, [words.decode_id], uniforms, words.end_id, GENERATION)
            assert row["text"] == words.decode(caption.tokens)
            assert row["logprob"] == pytest.approx(caption.logprob, rel=1e-4)
        features = filter.med.encode_image(eval_transform(24)(image)[None])
        ids, mask = filter.tokenizer([row["text"]])
        assert row["itm_score"] == pytest.approx(
            filter.med.match(filter.med.cross_keys(features), ids, mask).softmax(1)[0, 1].item(), abs=1e-5
        )
        cosine = (filter.med.project_image(features) @ filter.med.embed_text(ids, mask).T).item()
        assert row["itc_score"] == pytest.approx(cosine, abs=1e-5)


def test_the_random_models_disagree_about_the_texts(
    shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    scored = [row for row in annotate(shard, tmp_path / "part.parquet", models) if row["reason"] is None]
    assert len({row["text"] for row in scored if row["source"] == "synthetic"}) > 8
    assert np.std([row["itm_score"] for row in scored]) > 0.02
    assert np.std([row["itc_score"] for row in scored]) > 0.02


def test_an_image_is_encoded_once_by_each_model(shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]) -> None:
    seen: dict[str, int] = {"captioner": 0, "filter": 0}

    def counting(name: str) -> Any:
        def hook(module: torch.nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> None:
            seen[name] += len(given[0])

        return hook

    hooks = [
        models[0].med.image_encoder.register_forward_hook(counting("captioner")),
        models[1].med.image_encoder.register_forward_hook(counting("filter")),
    ]
    annotate(shard, tmp_path / "part.parquet", models)
    for hook in hooks:
        hook.remove()
    assert seen == {"captioner": 6, "filter": 6}


def test_the_same_shard_gives_the_same_bytes(shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]) -> None:
    annotate(shard, tmp_path / "one.parquet", models)
    annotate(shard, tmp_path / "two.parquet", models)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_neither_batch_size_nor_number_of_candidates_changes_a_text(
    shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    def texts(config: AnnotateConfig) -> dict[tuple[str, int], str]:
        rows = annotate(shard, tmp_path / f"{config.batch_size}-{config.candidates}.parquet", models, config)
        return {(row["uid"], row["candidate"]): row["text"] for row in rows}

    whole = texts(AnnotateConfig(candidates=2, batch_size=64, workers=0))
    assert texts(AnnotateConfig(candidates=2, batch_size=1, workers=0)) == whole
    assert texts(AnnotateConfig(candidates=2, batch_size=2, workers=0)) == whole
    more = texts(AnnotateConfig(candidates=4, batch_size=3, workers=0))
    assert {key: text for key, text in more.items() if key[1] <= 2} == whole
    assert len(more) == 7 * 5


def test_a_part_is_written_once_and_again_when_a_setting_changes(
    shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    target = tmp_path / "part.parquet"
    first = annotate_shard(shard, target, *models, CONFIG, GENERATION, 0)
    written = target.stat().st_mtime_ns
    again = annotate_shard(shard, target, *models, replace(CONFIG, batch_size=2), GENERATION, 0)
    assert again.skipped
    assert again == first._replace(skipped=True, seconds=0.0, waited=0.0)
    assert target.stat().st_mtime_ns == written
    captioner, filter = models
    other = replace(filter, digest="another")
    marks = {check_part(target, "annotation/1")["capfilt.fingerprint"]}
    for settings in (
        (captioner, filter, replace(CONFIG, candidates=1), GENERATION, 0),
        (captioner, filter, CONFIG, replace(GENERATION, p=0.5), 0),
        (captioner, filter, CONFIG, GENERATION, 1),
        (captioner, other, CONFIG, GENERATION, 0),
        (replace(captioner, digest="another"), filter, CONFIG, GENERATION, 0),
    ):
        assert not annotate_shard(shard, target, *settings).skipped
        marks.add(check_part(target, "annotation/1")["capfilt.fingerprint"])
    assert len(marks) == 6


def test_a_shard_without_images_gives_an_empty_part(tmp_path: Path, models: tuple[Captioner, Filter]) -> None:
    shard = tmp_path / "empty.parquet"
    rows = [{"uid": "a", "status": "failed", "reason": "dns"}]
    write_shard(shard, [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", 1)
    summary = annotate_shard(shard, tmp_path / "part.parquet", *models, CONFIG, GENERATION, 0)
    assert (summary.images, summary.candidates, summary.unscored) == (0, 0, 0)
    assert pq.read_schema(tmp_path / "part.parquet").remove_metadata().equals(ANNOTATION_SCHEMA)


def test_a_batch_without_a_readable_image_still_has_all_its_rows(
    tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    shard = tmp_path / "bad.parquet"
    rows = [{"uid": "a", "caption": "x", "status": "ok", "sha256": "0", "image": b"no image"}]
    write_shard(shard, [pa.Table.from_pylist(rows, SHARD_SCHEMA)], "settings", 1)
    found = annotate(shard, tmp_path / "part.parquet", models)
    assert [(row["text"], row["reason"]) for row in found] == [(text, "not_an_image") for text in ("x", "", "")]


def test_a_torn_shard_is_named_and_nothing_is_written(
    shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ShardError, match=NAME):
        annotate_shard(shard, tmp_path / "part.parquet", *models, CONFIG, GENERATION, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize("method", ["beam", "greedy"])
def test_other_decodings_need_no_seed_and_give_the_same_text_each_time(
    method: str, shard: Path, tmp_path: Path, models: tuple[Captioner, Filter]
) -> None:
    rows = annotate(shard, tmp_path / "part.parquet", models, generation=replace(GENERATION, method=method))
    texts = [[row["text"] for row in rows if row["uid"] == f"a{n}" and row["candidate"]] for n in (1, 2, 7)]
    assert all(first == second != "" for first, second in texts)


def test_the_filter_scores_nothing_where_there_is_no_text(models: tuple[Captioner, Filter]) -> None:
    images = torch.zeros(2, 3, 24, 24)
    assert models[1].score(images, [[], []]) == [[], []]
    [none, [score]] = models[1].score(images, [[], ["a star"]])
    assert none == []
    assert 0 <= score.itm <= 1
    assert -1 <= score.itc <= 1


def test_models_in_transformers_format_annotate_alike(
    shard: Path, tmp_path: Path, models: tuple[Captioner, Filter], checkpoints: tuple[Path, Path]
) -> None:
    write_transformers(tmp_path / "captioner", load_med(checkpoints[0]), "captioner")
    write_transformers(tmp_path / "filter", load_med(checkpoints[1]), "filter")
    theirs = Captioner.load(tmp_path / "captioner"), Filter.load(tmp_path / "filter")
    rows = annotate(shard, tmp_path / "part.parquet", models)
    again = annotate(shard, tmp_path / "again.parquet", theirs)
    digests = {"captioner": theirs[0].digest, "filter": theirs[1].digest}
    assert again == [{**row, **{key: digests[key] for key in digests if row[key] is not None}} for row in rows]
