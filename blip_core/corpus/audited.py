"""What a person's marks say of a round's corpus, as far as they are of the corpus that stands: noise with its interval.

`evaluation/answers.py` writes it; here it is read, for all who show a round.
"""

from pathlib import Path
from typing import NamedTuple

from blip_core.corpus.schemas import CORPUS_VERSION
from blip_core.corpus.selection import WHERE_KEY
from blip_core.data.shards import check_part
from blip_core.files import read_json
from blip_core.workspace import Round

# The columns that show it.
AUDITED = ("audited_noise", "audited_noise_low", "audited_noise_high")


class AuditedNoise(NamedTuple):
    """The share of wrong texts in a corpus, 0..1, by hand, its interval of a level such as 0.95, and how many pairs
    were marked right or wrong."""

    value: float
    low: float
    high: float
    level: float
    marked: int


def audited_noise(made: Round) -> AuditedNoise | None:
    """The noise of a round's corpus by hand; None where nobody has marked it.

    None as well where the corpus was published under another predicate since: it is another one then. Raises
    WorkspaceError where audit.json is torn, ShardError where a part of the corpus is.
    """
    if not made.audit.exists():
        return None
    found = read_json(made.audit)
    noise = found["estimates"]["all"]["corpus_noise"]
    if noise is None or found["where"] != _published(made):
        return None
    return AuditedNoise(noise["value"], noise["low"], noise["high"], found["level"], found["right"] + found["wrong"])


def audited_columns(made: Round) -> dict[str, float | None]:
    """The same as AUDITED, which are None where it is."""
    found = audited_noise(made)
    return dict(zip(AUDITED, found[:3] if found else (None, None, None), strict=True))


def _published(made: Round) -> str | None:
    """The predicate of the corpus that stands; the human pairs have none."""
    parts: list[Path] = sorted(made.corpus.glob("*.parquet"))
    said = (check_part(part, CORPUS_VERSION).get(WHERE_KEY) for part in parts)
    return next((where for where in said if where is not None), None)
