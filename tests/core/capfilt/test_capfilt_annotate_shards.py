"""Many shards in one go: read ahead, none in another's way, each with the bytes that it has alone."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from blip_core.capfilt.annotate import ShardJob, annotate_shard, annotate_shards
from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig, AnnotationSummary, FailedShard, ShardProgress
from blip_core.capfilt.reading import ShardReader, image_rows
from blip_core.corpus.schemas import part_writer
from blip_core.data.decoding import decoder
from blip_core.errors import CapfiltError, ShardError, WorkspaceError
from blip_core.med.decoding import GenerationConfig

CONFIG = AnnotateConfig(candidates=2, batch_size=4, workers=0)
GENERATION = GenerationConfig(max_length=5, min_length=1)

Models = tuple[Captioner, Filter]
MakeShard = Callable[..., Path]


@pytest.fixture
def shards(make_shard: MakeShard) -> list[Path]:
    """Of 5, 1, 0, 8 and 9 images; batches of four end within and at the end of a shard."""
    return [
        make_shard(f"shard{place}", range(100 * place, 100 * place + size))
        for place, size in enumerate((5, 1, 0, 8, 9))
    ]


def jobs_of(shards: list[Path], folder: Path) -> list[ShardJob]:
    return [ShardJob(shard, folder / shard.name) for shard in shards]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_s_bytes_do_not_depend_on_the_shards_beside_it(
    workers: int, shards: list[Path], tmp_path: Path, models: Models
) -> None:
    config = replace(CONFIG, workers=workers)
    jobs = jobs_of(shards, tmp_path / "together")
    results = list(annotate_shards(jobs, *models, config, GENERATION, 3))
    assert [result.shard for result in results] == [shard.stem for shard in shards]
    assert [result.images for result in results if isinstance(result, AnnotationSummary)] == [5, 1, 0, 8, 9]
    for shard in shards:
        annotate_shard(shard, tmp_path / "alone" / shard.name, *models, CONFIG, GENERATION, 3)
        together = (tmp_path / "together" / shard.name).read_bytes()
        assert together == (tmp_path / "alone" / shard.name).read_bytes()
        assert pq.read_metadata(tmp_path / "alone" / shard.name).num_rows % 3 == 0
    assert [path.name for path in (tmp_path / "together").iterdir() if path.name.startswith(".")] == []


def test_what_stands_is_passed_over_amid_the_others(shards: list[Path], tmp_path: Path, models: Models) -> None:
    jobs = jobs_of(shards, tmp_path / "parts")
    first = annotate_shard(*jobs[1][:2], *models, CONFIG, GENERATION, 3)
    results = list(annotate_shards(jobs, *models, CONFIG, GENERATION, 3))
    assert [result.skipped for result in results] == [False, True, False, False, False]
    assert results[1] == first._replace(skipped=True, seconds=0.0, waited=0.0)
    assert all(result.skipped for result in annotate_shards(jobs, *models, CONFIG, GENERATION, 3))


def test_a_failed_shard_does_not_hold_up_the_others(shards: list[Path], tmp_path: Path, models: Models) -> None:
    shards[0].write_bytes(shards[0].read_bytes()[:-20])
    data = shards[3].read_bytes()
    shards[3].write_bytes(data[:300] + bytes(3000) + data[3300:])  # the footer is whole, the pages are not
    shards.insert(2, tmp_path / "shards" / "gone.parquet")
    (tmp_path / "parts" / shards[-1].name).mkdir(parents=True)  # a part cannot take this name
    results = list(annotate_shards(jobs_of(shards, tmp_path / "parts"), *models, CONFIG, GENERATION, 3))
    errors = {result.shard: result.error for result in results if isinstance(result, FailedShard)}
    assert [result.shard for result in results] == [shard.stem for shard in shards]
    assert {name: type(error) for name, error in errors.items()} == {
        "shard0": ShardError,
        "gone": ShardError,
        "shard3": ShardError,
        "shard4": WorkspaceError,
    }
    assert all(f"{name}.parquet" in str(error) for name, error in errors.items())
    assert sorted(path.name for path in (tmp_path / "parts").iterdir() if path.is_file()) == [
        "shard1.parquet",
        "shard2.parquet",
    ]


def test_rows_that_are_lost_are_noticed_before_a_part_stands(
    shards: list[Path], tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "blip_core.capfilt.reading.image_rows", lambda shard, size: (rows[1:] for rows in image_rows(shard, size))
    )
    with pytest.raises(ShardError, match=r"shard0\.parquet: 9 candidates for 15 expected; the part is not written"):
        annotate_shard(shards[0], tmp_path / "part.parquet", *models, CONFIG, GENERATION, 3)
    assert not (tmp_path / "part.parquet").exists()


def test_progress_is_told_after_every_batch(shards: list[Path], tmp_path: Path, models: Models) -> None:
    told: list[ShardProgress] = []
    results = list(
        annotate_shards(jobs_of(shards, tmp_path / "parts"), *models, CONFIG, GENERATION, 3, progress=told.append)
    )
    expected = {0: [4, 5], 1: [1], 2: [0], 3: [4, 8], 4: [4, 8, 9]}
    assert [(one.shard, one.done) for one in told] == [(f"shard{n}", done) for n in expected for done in expected[n]]
    assert [one.total for one in told] == [5, 5, 1, 0, 8, 8, 9, 9, 9]
    for one in told:
        assert 0 <= one.waited <= one.seconds
    for result in results:
        last = [one for one in told if one.shard == result.shard][-1]
        assert isinstance(result, AnnotationSummary)
        assert last.seconds <= result.seconds
        assert last.waited == result.waited


def test_time_without_data_is_counted_as_waiting(shards: list[Path], tmp_path: Path, models: Models) -> None:
    def late() -> Iterator[ShardJob]:
        for job in jobs_of(shards[:2], tmp_path / "parts"):
            time.sleep(0.3)
            yield job

    results = list(annotate_shards(late(), *models, CONFIG, GENERATION, 3))
    assert isinstance(results[0], AnnotationSummary)
    assert results[0].waited >= 0.3


def test_the_next_shard_is_decoded_while_this_one_computes(
    shards: list[Path], tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first caption waits until the second shard has been read: without overlap it would wait for ever."""
    read = threading.Event()

    def noticing(shard: Path, size: int) -> Iterator[list[dict[str, object]]]:
        yield from image_rows(shard, size)
        if shard == shards[1]:
            read.set()

    caption = Captioner.caption

    def waiting(*arguments: object) -> object:
        assert read.wait(timeout=60)
        return caption(*arguments)

    monkeypatch.setattr("blip_core.capfilt.reading.image_rows", noticing)
    monkeypatch.setattr(Captioner, "caption", waiting)
    results = list(annotate_shards(jobs_of(shards[:2], tmp_path / "parts"), *models, CONFIG, GENERATION, 3))
    assert not any(isinstance(result, FailedShard) for result in results)


def test_no_more_is_read_ahead_than_the_window(shards: list[Path], tmp_path: Path) -> None:
    asked = []

    def jobs() -> Iterator[ShardJob]:
        for number in range(1000):
            asked.append(number)
            yield ShardJob(shards[1], tmp_path / f"{number}.parquet")

    with decoder([8], workers=0) as pictures:
        steps = ShardReader(jobs(), lambda job: None, pictures, 4).steps()
        for _ in range(3):
            next(steps)
        steps.close()
    assert 3 <= len(asked) <= 3 + 3


def test_who_stops_listening_leaves_neither_threads_nor_files(
    shards: list[Path], tmp_path: Path, models: Models
) -> None:
    threads = threading.active_count()
    results = annotate_shards(jobs_of(shards, tmp_path / "parts"), *models, CONFIG, GENERATION, 3)
    next(results)
    results.close()
    assert threading.active_count() == threads
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["shard0.parquet"]


class Tight(Captioner):
    """A Captioner whose device has room for so many images."""

    most = 3
    error: type[RuntimeError] = torch.OutOfMemoryError
    message = "CUDA out of memory. Tried to allocate 2 GiB"

    def caption(self, images: torch.Tensor, *rest: object) -> list[list[tuple[str, float]]]:
        if len(images) > self.most:
            raise self.error(self.message)
        return super().caption(images, *rest)


class TightOnCPU(Tight):
    error = RuntimeError
    message = (
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    )


class Broken(Tight):
    error = RuntimeError
    message = "mat1 and mat2 shapes cannot be multiplied"


def narrow(models: Models, kind: type[Tight]) -> Models:
    captioner, filter = models
    return kind(captioner.med, captioner.tokenizer, captioner.digest), filter


@pytest.mark.parametrize("kind", [Tight, TightOnCPU])
def test_out_of_memory_halves_the_batch_and_goes_on_with_one_line_each_time(
    kind: type[Tight],
    shards: list[Path],
    tmp_path: Path,
    models: Models,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kind, "most", 3)
    config = replace(CONFIG, batch_size=9)
    jobs = jobs_of(shards[3:], tmp_path / "tight")
    results = list(annotate_shards(jobs, *narrow(models, kind), config, GENERATION, 3))
    assert [result.images for result in results if isinstance(result, AnnotationSummary)] == [8, 9]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 8 images at once; going on with 4",
        "out of memory with 4 images at once; going on with 2",
    ]
    for job in jobs:
        annotate_shard(job.shard, tmp_path / "part.parquet", *models, replace(config, batch_size=2), GENERATION, 3)
        assert job.target.read_bytes() == (tmp_path / "part.parquet").read_bytes()


def test_one_image_that_is_too_much_is_named(
    shards: list[Path], tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tight, "most", 0)
    results = list(annotate_shards(jobs_of(shards, tmp_path), *narrow(models, Tight), CONFIG, GENERATION, 3))
    failed = {result.shard: str(result.error) for result in results if isinstance(result, FailedShard)}
    assert failed.keys() == {"shard0", "shard1", "shard3", "shard4"}
    assert failed["shard0"].startswith("shard shard0, image a00000: out of memory with one image alone (CUDA out of")


def test_another_error_of_the_model_is_no_matter_of_memory(shards: list[Path], tmp_path: Path, models: Models) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(annotate_shards(jobs_of(shards, tmp_path), *narrow(models, Broken), CONFIG, GENERATION, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


class Deadly(bytes):
    """An image that kills the process that is to decode it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (9,)


def test_an_image_that_kills_processes_costs_its_shard_alone(
    shards: list[Path], tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(shard: Path, size: int) -> Iterator[list[dict[str, object]]]:
        for rows in image_rows(shard, size):
            yield [row | {"image": Deadly(b"image")} if shard == shards[0] else row for row in rows]

    monkeypatch.setattr("blip_core.capfilt.reading.image_rows", poisoned)
    config = replace(CONFIG, workers=1)
    first, *others = annotate_shards(jobs_of(shards, tmp_path / "parts"), *models, config, GENERATION, 3)
    assert isinstance(first, FailedShard)
    assert isinstance(first.error, CapfiltError)
    assert "a process that decodes died" in str(first.error)
    assert [other.images for other in others if isinstance(other, AnnotationSummary)] == [1, 0, 8, 9]


def test_a_part_s_row_groups_are_full_however_its_rows_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip_core.corpus.schemas.ROW_GROUP_ROWS", 10)
    rows = pa.table({"uid": [f"{number:03}" for number in range(34)]})
    for name, size in (("one", 3), ("two", 34), ("three", 10)):
        with part_writer(tmp_path / name, rows.schema, "annotation/1", "0") as part:
            for start in range(0, 34, size):
                part.write(rows.slice(start, size))
        assert part.rows == 34
    found = pq.read_metadata(tmp_path / "one")
    assert [found.row_group(group).num_rows for group in range(found.num_row_groups)] == [10, 10, 10, 4]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "three").read_bytes()
