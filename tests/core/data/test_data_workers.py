"""Workers: the same batches as without them, each from a process of one thread that dies with the training."""

import itertools
import multiprocessing
import os
import textwrap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blip_core.data.pairs import PairSource
from blip_core.data.stream import PairBatch, PairStream
from blip_core.data.transforms import eval_transform, train_transform
from blip_core.errors import InputError, ShardError

AUGMENTED = train_transform(8, 0.3, flip=True, augment=True)


@pytest.fixture
def sources(write_pairs: Callable[..., PairSource]) -> list[PairSource]:
    """45 pairs with an image and 5 without in 17 row groups."""
    return [write_pairs("a", range(50), 3, broken=[3, 11, 12, 31, 44])]


def same(one: PairBatch, other: PairBatch) -> bool:
    return (
        torch.equal(one.images, other.images)
        and one.texts == other.texts
        and torch.equal(one.image_ids, other.image_ids)
    )


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_workers_do_not_change_batches_positions_or_counts(sources: list[PairSource], world: int, workers: int) -> None:
    for rank in {0, world - 1}:
        plain = PairStream(sources, 8, AUGMENTED, 3, rank, world)
        worked = PairStream(sources, 8, AUGMENTED, 3, rank, world, workers=workers)
        for one, other in itertools.islice(zip(plain.batches(), worked.batches(), strict=True), 15):
            assert same(one, other)
            assert plain.position == worked.position
            assert plain.undecodable == worked.undecodable
        assert plain.undecodable > 0


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 2), (2, 1)])
def test_another_number_of_workers_goes_on_where_the_last_stood(
    sources: list[PairSource], before: int, after: int
) -> None:
    whole = list(itertools.islice(PairStream(sources, 5, AUGMENTED, 3).batches(), 20))
    stream = PairStream(sources, 5, AUGMENTED, 3, workers=before)
    list(itertools.islice(stream.batches(), 7))
    later = PairStream(sources, 5, AUGMENTED, 3, workers=after)
    for one, other in zip(whole[7:], later.batches(stream.position), strict=False):
        assert same(one, other)


def test_a_flow_s_thread_trains_with_workers_and_without_a_warning(sources: list[PairSource]) -> None:
    seen: list[PairBatch] = []

    def train() -> None:
        seen.extend(itertools.islice(PairStream(sources, 8, AUGMENTED, 3, workers=2).batches(), 5))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert all(map(same, seen, PairStream(sources, 8, AUGMENTED, 3).batches()))
    assert len(seen) == 5


def test_workers_leave_the_training_s_chance_alone(sources: list[PairSource]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(PairStream(sources, 8, AUGMENTED, 3, workers=1).batches())
    assert torch.equal(torch.rand(3), expected)


def test_each_worker_has_one_thread_and_lanes_of_its_own(
    sources: list[PairSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "telling.py").write_text(
        textwrap.dedent("""
            import os, pyarrow, torch
            def tell(picture):
                return torch.tensor([os.getpid(), torch.get_num_threads(), pyarrow.cpu_count()])
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    import telling

    stream = PairStream(sources, 8, telling.tell, 3, workers=2)
    told = torch.cat([batch.images for batch in itertools.islice(stream.batches(), 6)])
    process, torch_threads, arrow_threads = told.T.tolist()
    assert set(torch_threads) == set(arrow_threads) == {1}
    assert len(set(process)) == 2
    assert os.getpid() not in process
    assert len(set(process[0::2])) == len(set(process[1::2])) == 1  # lane n % 8 is of worker n % 2


def test_workers_go_with_the_iterator(sources: list[PairSource]) -> None:
    batches = PairStream(sources, 8, AUGMENTED, 3, workers=2).batches()
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert multiprocessing.active_children() == []


def test_an_error_in_a_worker_is_the_error_and_stays_one_line(
    write_pairs: Callable[..., PairSource], tmp_path: Path
) -> None:
    bad = write_pairs("bad", range(4), broken=range(4))
    with pytest.raises(InputError, match=r"^training pairs: none of the 4 images in \S+bad\.parquet can be decoded; "):
        next(PairStream([bad], 2, eval_transform(4), 0, workers=2).batches())
    torn = write_pairs("torn", range(40))
    stream = PairStream([torn], 2, eval_transform(4), 0, workers=1)
    torn.path.write_bytes(torn.path.read_bytes()[:100])
    with pytest.raises(ShardError, match=r"^\S+torn\.parquet: cannot be read as Parquet") as caught:
        next(stream.batches())
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []  # though the error still holds the frames it came through


def test_workers_die_with_a_training_that_is_killed(
    sources: list[PairSource], kill_program: Callable[[Path], tuple[list[int], list[int]]], tmp_path: Path
) -> None:
    script = tmp_path / "training.py"
    script.write_text(
        textwrap.dedent(f"""
            import multiprocessing, pathlib, time
            from blip_core.data.pairs import PairSource
            from blip_core.data.stream import PairStream
            from blip_core.data.transforms import eval_transform
            if __name__ == "__main__":
                source = PairSource(pathlib.Path({str(sources[0].path)!r}))
                batches = PairStream([source], 8, eval_transform(4), 0, workers=2).batches()
                next(batches)
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
                time.sleep(600)
        """)
    )
    before, after = kill_program(script)
    assert len(before) == 2
    assert after == []
