"""What a person's marks say of a round's corpus, as far as they are of the corpus that stands: noise with its interval.

`evaluation/answers.py` writes it; here it is read, for all who show a round.
"""

from typing import NamedTuple

from blip_core.corpus.rules import further_rules
from blip_core.corpus.selection import published_rules
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

    None as well where the corpus was published under other rules since: it is another one then. Raises
    WorkspaceError where audit.json is torn, ShardError where a part of the corpus is.
    """
    if not made.audit.exists():
        return None
    found = read_json(made.audit)
    noise = found["estimates"]["all"]["corpus_noise"]
    rules = published_rules(made.corpus)
    published = (rules.where, further_rules(rules)) if rules else (None, {})
    if noise is None or (found["where"], found["rules"]) != published:
        return None
    return AuditedNoise(noise["value"], noise["low"], noise["high"], found["level"], found["right"] + found["wrong"])


def audited_columns(made: Round) -> dict[str, float | None]:
    """The same as AUDITED, which are None where it is."""
    found = audited_noise(made)
    return dict(zip(AUDITED, found[:3] if found else (None, None, None), strict=True))
