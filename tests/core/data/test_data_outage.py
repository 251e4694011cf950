"""An outage is no answer: a shard of which far less arrives than of those before it is not written."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest, norm

from blip_core.data.fetch import Fetched
from blip_core.data.outage import DEVIATIONS, Tally, check_network, is_outage, tally, tally_before
from blip_core.data.shards import RETRY_PREFIX, SHARD_SCHEMA, write_shard
from blip_core.errors import DownloadError
from blip_core.workspace import Workspace

HALF = 0.5
Stand = Callable[[str, dict[str | None, int]], None]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path)


@pytest.fixture
def stand(workspace: Workspace) -> Stand:
    """Writes a shard with so many rows of each reason; None: it has an image."""

    def write(name: str, reasons: dict[str | None, int]) -> None:
        workspace.shards.mkdir(exist_ok=True)
        rows = [
            {"uid": f"{name}{number}", "status": "failed" if reason else "ok", "reason": reason}
            for number, reason in enumerate(reason for reason, count in reasons.items() for _ in range(count))
        ]
        write_shard(workspace.shard(name), [pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)], "x", len(rows))

    return write


def answers(arrived: int, **failed: int) -> dict[str, Fetched]:
    """So many images, and so many URLs that failed for a reason."""
    outcomes = [Fetched(Path("image"))] * arrived
    outcomes += [
        Fetched(None, reason, f"message of {reason}") for reason, count in failed.items() for _ in range(count)
    ]
    return {f"http://h/{number}": outcome for number, outcome in enumerate(outcomes)}


@pytest.mark.parametrize(("asked", "answered"), [(1, 0), (10, 10), (20, 3), (1000, 621), (100_000, 99_999)])
def test_the_bounds_are_wilsons(asked: int, answered: int) -> None:
    expected = binomtest(answered, asked).proportion_ci(2 * norm.cdf(DEVIATIONS) - 1, method="wilson")
    assert Tally(asked, answered).bounds() == pytest.approx((expected.low, expected.high))


def test_an_outage_leaves_no_shard_and_says_what_is_usual(workspace: Workspace, stand: Stand) -> None:
    stand("aa", {None: 700, "not_found": 200, "dns": 100, "no_url": 300})
    with pytest.raises(DownloadError) as failure:
        check_network("bb", answers(150, not_found=50, dns=500, timeout=300), workspace, HALF)
    told = r"bb: 200 of its 1000 URLs were answered, 900 of 1000 in the shards before it \(dns 500, timeout 300; for "
    assert re.search(told, str(failure.value))
    assert "download.outage_below 0" in str(failure.value)


@pytest.mark.parametrize(
    ("arrived", "failed"),
    [
        (620, {"not_found": 280, "dns": 100}),  # as the shard before it
        (50, {"not_found": 850, "dns": 100}),  # few images, but the web answers
        (500, {"timeout": 500}),  # not surely below one half of what is usual
        (1, {"dns": 3}),  # too few to tell
    ],
)
def test_a_bad_hour_is_no_outage(workspace: Workspace, stand: Stand, arrived: int, failed: dict[str, int]) -> None:
    stand("aa", {None: 620, "not_found": 280, "dns": 100})
    check_network("bb", answers(arrived, **failed), workspace, HALF)


def test_the_first_shard_has_nothing_to_be_compared_with(workspace: Workspace) -> None:
    check_network("aa", answers(1, dns=999), workspace, HALF)
    with pytest.raises(DownloadError, match="none of its 999 URLs"):
        check_network("aa", answers(0, dns=999), workspace, HALF)


def test_who_switches_it_off_gets_the_shard(workspace: Workspace, stand: Stand) -> None:
    stand("aa", {None: 1000})
    check_network("bb", answers(1, dns=999), workspace, 0)
    with pytest.raises(DownloadError, match="1 of its 1000 URLs were answered"):
        check_network("bb", answers(1, dns=999), workspace, HALF)


def test_rows_that_nobody_asked_for_and_retries_say_nothing_of_the_network(workspace: Workspace, stand: Stand) -> None:
    stand("aa", {None: 5, "denied_url": 7, "duplicate_row": 9, "scheme_refused": 2, "timeout": 5})
    stand(f"{RETRY_PREFIX}aa", {None: 100})
    assert tally_before(workspace) == Tally(10, 5)
    assert tally([None, "too_small", "dns", "interrupted", "credentials_refused"]) == Tally(4, 2)


def test_no_normal_web_is_taken_for_an_outage() -> None:
    rng = np.random.default_rng(0)
    for share in (0.05, 0.3, 0.62, 0.95):
        for urls in (20, 100, 1000):
            before = Tally(32 * urls, int(rng.binomial(32 * urls, share)))
            shards = [Tally(urls, int(count)) for count in rng.binomial(urls, share, 10_000)]
            assert not any(is_outage(shard, before, HALF) for shard in shards), (share, urls)


def test_an_outage_in_the_middle_of_a_shard_is_seen_when_most_of_it_is_lost() -> None:
    before = Tally(32_000, 29_000)
    seen = [answered for answered in range(1001) if is_outage(Tally(1000, answered), before, HALF)]
    assert seen == [*range(seen[-1] + 1)]
    assert 380 < seen[-1] < 450
