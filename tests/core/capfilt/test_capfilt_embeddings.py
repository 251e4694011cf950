"""The Filter's embeddings of a shard's images: worked out again one by one, and never missing beside annotations."""

import io
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from blip_core.capfilt.annotate import annotate_shards
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig, AnnotationSummary, FailedShard, ShardJob, standing_part
from blip_core.corpus.schemas import embedding_schema
from blip_core.data.shards import check_part
from blip_core.data.transforms import eval_transform
from blip_core.errors import ShardError
from blip_core.med.decoding import GenerationConfig
from blip_core.workspace import Workspace

CONFIG = AnnotateConfig(candidates=2, batch_size=4, workers=0)
GENERATION = GenerationConfig(max_length=5, min_length=1)
SEED = 7

Models = tuple[Captioner, Filter]
MakeShard = Callable[..., Path]


@pytest.fixture
def job(make_shard: MakeShard, tmp_path: Path) -> ShardJob:
    """Seven images, the third of which cannot be decoded."""
    return ShardJob.of(Workspace(tmp_path).round(1), make_shard("c0ffee", [0, 1, b"no image", 3, 4, 5, 6]))


def annotate(job: ShardJob, models: Models, seed: int = SEED) -> AnnotationSummary:
    (result,) = annotate_shards([job], *models, CONFIG, GENERATION, seed)
    assert isinstance(result, AnnotationSummary)
    return result


def stands(job: ShardJob, models: Models) -> bool:
    return standing_part(job, models[0].digest, models[1].digest, CONFIG, GENERATION, SEED) is not None


def vectors_of(job: ShardJob) -> Path:
    assert job.embeddings is not None
    return job.embeddings


@torch.inference_mode()
def test_every_image_that_can_be_decoded_has_the_filters_own_projection_of_it(job: ShardJob, models: Models) -> None:
    annotate(job, models)
    rows = pq.read_table(vectors_of(job)).to_pylist()
    assert [row["uid"] for row in rows] == [f"a{place:05}" for place in (0, 1, 3, 4, 5, 6)]
    assert pq.read_schema(vectors_of(job)).remove_metadata().equals(embedding_schema(16))
    images = {row["uid"]: row["image"] for row in pq.read_table(job.shard).to_pylist()}
    med = models[1].med
    for row in rows:
        image = Image.open(io.BytesIO(images[row["uid"]]))
        expected = med.project_image(med.encode_image(eval_transform(24)(image)[None]))[0].numpy()
        assert np.asarray(row["embedding"], np.float32) == pytest.approx(expected, abs=1e-3)
        assert np.linalg.norm(np.asarray(row["embedding"], np.float32)) == pytest.approx(1, abs=2e-3)


def test_the_itc_score_is_the_cosine_of_the_stored_embedding_and_the_texts(job: ShardJob, models: Models) -> None:
    annotate(job, models)
    vectors = {
        row["uid"]: np.asarray(row["embedding"], np.float32) for row in pq.read_table(vectors_of(job)).to_pylist()
    }
    scored = [row for row in pq.read_table(job.target).to_pylist() if row["reason"] is None]
    assert len(scored) > 6
    for row in scored:
        with torch.inference_mode():
            text = models[1].med.embed_text(*models[1].tokenizer([row["text"]]))[0].numpy()
        assert row["itc_score"] == pytest.approx(float(vectors[row["uid"]] @ text), abs=2e-3)


def test_the_metadata_name_the_filter_and_no_captioner(job: ShardJob, models: Models) -> None:
    annotate(job, models)
    metadata = check_part(vectors_of(job), "embedding/1")
    assert len(metadata.pop("capfilt.fingerprint")) == 16
    assert metadata == {
        "capfilt.schema": "embedding/1",
        "capfilt.filter": models[1].digest,
        "capfilt.precision": "fp32",
    }


def test_score_and_embedding_come_of_one_pass_of_the_image_encoder(job: ShardJob, models: Models) -> None:
    seen: list[int] = []
    hook = models[1].med.image_encoder.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    annotate(job, models)
    hook.remove()
    assert sum(seen) == 6


def test_annotations_are_the_same_bytes_with_embeddings_and_without(
    job: ShardJob, models: Models, tmp_path: Path
) -> None:
    annotate(job, models)
    annotate(ShardJob(job.shard, tmp_path / "alone" / job.target.name), models)
    assert (tmp_path / "alone" / job.target.name).read_bytes() == job.target.read_bytes()
    assert [path.name for path in (tmp_path / "alone").iterdir()] == [job.target.name]


def test_embeddings_that_are_missing_are_added_without_a_text_or_a_score_made_anew(
    job: ShardJob, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotate(job, models)
    made, written = vectors_of(job).read_bytes(), job.target.stat().st_mtime_ns
    vectors_of(job).unlink()
    assert not stands(job, models)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be captioned or scored")

    monkeypatch.setattr(Captioner, "caption", refuse)
    monkeypatch.setattr(Filter, "judge_and_embed", refuse)
    summary = annotate(job, models)
    assert (summary.skipped, summary.images, summary.candidates) == (True, 7, 21)
    assert vectors_of(job).read_bytes() == made
    assert job.target.stat().st_mtime_ns == written
    assert stands(job, models)


def test_embeddings_of_another_filter_are_replaced_and_of_another_seed_they_are_the_same(
    job: ShardJob, models: Models
) -> None:
    annotate(job, models)
    first = vectors_of(job).read_bytes()
    assert not annotate(job, models, seed=SEED + 1).skipped
    assert vectors_of(job).read_bytes() == first
    other = (models[0], replace(models[1], digest="another"))
    assert not annotate(job, other).skipped
    assert check_part(vectors_of(job), "embedding/1")["capfilt.filter"] == "another"
    assert not stands(job, models)


def test_a_shard_without_an_image_that_can_be_decoded_has_an_empty_part(
    make_shard: MakeShard, models: Models, tmp_path: Path
) -> None:
    for name, images in (("empty", []), ("odd", [b"no image", b""])):
        job = ShardJob.of(Workspace(tmp_path).round(1), make_shard(name, images))
        annotate(job, models)
        assert pq.read_table(vectors_of(job)).num_rows == 0
        assert pq.read_schema(vectors_of(job)).remove_metadata().equals(embedding_schema(16))
        assert stands(job, models)


def test_something_else_in_the_place_of_the_embeddings_is_named(job: ShardJob, models: Models) -> None:
    annotate(job, models)
    vectors_of(job).write_bytes(b"somebody's")
    (result,) = annotate_shards([job], *models, CONFIG, GENERATION, SEED)
    assert isinstance(result, FailedShard)
    assert isinstance(result.error, ShardError)
    assert str(vectors_of(job)) in str(result.error)


# Dies when the second part is to get its name.
WORKER = f"""
    import os, pathlib, signal, sys
    from blip_core.capfilt.annotate import annotate_shards
    from blip_core.capfilt.captioner import Captioner
    from blip_core.capfilt.filter import Filter
    from blip_core.capfilt.parts import AnnotateConfig, ShardJob
    from blip_core.med.decoding import GenerationConfig

    replace, named = pathlib.Path.replace, []

    def dying(self, target):
        if named:
            os.kill(os.getpid(), signal.SIGKILL)
        named.append(target)
        return replace(self, target)

    if __name__ == "__main__":
        captioner, filter, *places = map(pathlib.Path, sys.argv[1:])
        pathlib.Path.replace = dying
        models = Captioner.load(captioner), Filter.load(filter)
        config, generation = {CONFIG!r}, {GENERATION!r}
        list(annotate_shards([ShardJob(*places)], *models, config, generation, {SEED}))
"""


def test_a_worker_that_is_killed_between_the_two_parts_leaves_embeddings_alone_and_the_next_one_makes_it_whole(
    job: ShardJob, models: Models, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    command = [sys.executable, str(tmp_path / "worker.py"), *map(str, (*checkpoints, *job))]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert vectors_of(job).exists()
    assert not job.target.exists()
    assert not stands(job, models)
    assert [path.name for path in job.target.parent.iterdir() if path.name.startswith(".")] != []
    left = vectors_of(job).stat().st_mtime_ns
    assert not annotate(job, models).skipped
    assert vectors_of(job).stat().st_mtime_ns == left
    for part in (job.target, vectors_of(job)):
        assert [path.name for path in part.parent.iterdir()] == [job.shard.name]
    assert stands(job, models)
    made = [part.read_bytes() for part in (job.target, vectors_of(job))]
    for part in (job.target, vectors_of(job)):
        part.unlink()
    annotate(job, models)
    assert [part.read_bytes() for part in (job.target, vectors_of(job))] == made
