"""The probe: it counts what the engine does after the warm-up, ends in time, and leaves nothing."""

import io
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip_core.capfilt.captioner import Captioner
from blip_core.capfilt.filter import Filter
from blip_core.capfilt.parts import AnnotateConfig, ShardProgress
from blip_core.capfilt.probe import TEXTS, Probe, _StopWatch, _TimeIsUp, probe, write_sample
from blip_core.med.decoding import GenerationConfig


def test_only_what_is_done_between_warm_up_and_end_counts() -> None:
    # at the end of each batch: the time, and images done of the shard, a new one from the fourth batch on
    batches = [(40.0, 8, 3.0), (42.0, 16, 3.5), (43.0, 20, 3.5), (45.0, 8, 0.25), (50.5, 16, 0.5)]
    times = iter([0.0, *(time for time, _, _ in batches)])
    watch = _StopWatch(seconds=10.0, warm_up=1, clock=lambda: next(times))
    for _, images, waited in batches[:4]:
        watch(ShardProgress("probe", images, 20, 0.0, waited))
    with pytest.raises(_TimeIsUp):
        watch(ShardProgress("probe", 16, 20, 0.0, 0.5))
    assert watch.measured() == Probe(images=8 + 4 + 8 + 8, batches=4, seconds=10.5, waited=0.5 + 0.0 + 0.25 + 0.25)
    assert watch.measured().images_per_second == pytest.approx(28 / 10.5)


def test_the_pictures_are_jpegs_of_the_stored_size_and_as_large_as_photographs(tmp_path: Path) -> None:
    write_sample(tmp_path / "probe.parquet", 1500, 384, ["one", "two"])
    rows = pq.read_table(tmp_path / "probe.parquet").to_pylist()
    assert len({row["uid"] for row in rows}) == len({row["sha256"] for row in rows}) == 1500
    assert [row["caption"] for row in rows[:3]] == ["one", "two", "one"]
    pictures = {row["image"] for row in rows}
    assert len(pictures) == 32
    for data in pictures:
        with Image.open(io.BytesIO(data)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (512, 384))
        assert 0.5 < 8 * len(data) / (512 * 384) < 5  # bits a pixel


def test_the_real_engine_is_measured_over_more_than_one_shard_and_nothing_is_left(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    captioner, filter = Captioner.load(published / "captioner"), Filter.load(published / "filter")
    config = AnnotateConfig(candidates=2, batch_size=4, workers=0)
    # a shard is one batch: what is counted is never of the first one
    measured = probe(captioner, filter, config, GenerationConfig(max_length=6), 0, 48, 3, TEXTS, seconds=0.2)
    assert measured.seconds >= 0.2
    assert measured.images == 3 * measured.batches > 0
    assert 0 <= measured.waited < measured.seconds
    assert list(tmp_path.iterdir()) == []
