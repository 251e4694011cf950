"""Outages: where far fewer URLs of a shard are answered than of the shards before it, the network is down.

Written all the same, its failures would stand for images that nobody asked for. An answer is an image, or any failure
that is for good: a page that is not found says that the network works.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from blip_core import stores
from blip_core.data.denied import DENIED_REASONS
from blip_core.data.fetch import Fetched
from blip_core.data.shards import RETRY_PREFIX, TRANSIENT, read_shard
from blip_core.errors import DownloadError
from blip_core.workspace import Workspace

# Names are hashes, so that the first shards by name are a sample of all.
SHARDS_COMPARED = 32
# Of the normal distribution, for both bounds: one shard in a thousand would be beyond them by chance.
DEVIATIONS = 3.0


# Of rows whose URL nobody was asked for.
NEVER_ASKED = frozenset({"no_url", "duplicate_row", "scheme_refused", "credentials_refused", *DENIED_REASONS})


class Tally(NamedTuple):
    """URLs that were asked for, and those of them that were answered."""

    asked: int
    answered: int

    def bounds(self) -> tuple[float, float]:
        """Between which the share of answers lies, 0..1: Wilson's interval (1927); at least one URL was asked for."""
        share, spread = self.answered / self.asked, DEVIATIONS**2 / self.asked
        middle = share + spread / 2
        half = math.sqrt(spread * (share * (1 - share) + spread / 4))
        return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def check_network(name: str, answers: Mapping[str, Fetched], workspace: Workspace, outage_below: float) -> None:
    """Judges the answers to a shard's URLs before they are written.

    Raises DownloadError where every URL failed for a reason that may pass, or where the upper bound of the share that
    was answered is below `outage_below` times the lower bound of that of the shards that stand.
    """
    failed = [answer for answer in answers.values() if answer.reason in TRANSIENT]
    if not failed:
        return
    here = Tally(len(answers), len(answers) - len(failed))
    if not here.answered:
        raise DownloadError(
            f"shard {name}: none of its {here.asked} URLs could be fetched ({_listed(failed)}); no shard was written. "
            "The network or the hosts are down: run again when they answer"
        )
    before = tally_before(workspace) if here.bounds()[1] < outage_below else Tally(0, 0)
    if is_outage(here, before, outage_below):
        raise DownloadError(
            f"shard {name}: {here.answered} of its {here.asked} URLs were answered, {before.answered} of "
            f"{before.asked} in the shards before it ({_listed(failed)}); no shard was written. That is an outage: run "
            "again when it is over, or where these hosts are gone for good, with download.outage_below 0"
        )


def is_outage(here: Tally, before: Tally, outage_below: float) -> bool:
    """Whether so few answers are surely below that part of what is usual; never, where nothing was before."""
    return bool(here.asked and before.asked) and here.bounds()[1] < outage_below * before.bounds()[0]


def tally_before(workspace: Workspace) -> Tally:
    """What the shards that stand say, or SHARDS_COMPARED of them; those of retries have nothing but what was settled.

    Raises ShardError where one is torn.
    """
    paths = [path for path in workspace.shard_paths() if not path.stem.startswith(RETRY_PREFIX)][:SHARDS_COMPARED]
    tallies = list(stores.each(paths, lambda path: tally(read_shard(path, ["reason"])["reason"].to_pylist())))
    return Tally(sum(one.asked for one in tallies), sum(one.answered for one in tallies))


def tally(reasons: Iterable[str | None]) -> Tally:
    """Of the rows of a shard, by their reasons."""
    asked = [reason for reason in reasons if reason not in NEVER_ASKED]
    return Tally(len(asked), sum(reason not in TRANSIENT for reason in asked))


def _listed(failed: list[Fetched]) -> str:
    counts = Counter(str(answer.reason) for answer in failed)
    listed = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
    return f"{listed}; for example: {failed[0].message}"
