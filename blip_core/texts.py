"""What of a stranger's text is taken: nothing that cannot be seen, and no more than a caption could be.

Characters that are not shown can turn a text around for its reader, hide what a search would find, or carry a message
to a program. The text as it was delivered stays in the shard; a candidate is what is left of it.
"""

import re
from typing import NamedTuple

# A text of more characters is no caption. It is judged as delivered, before anything is taken from it.
MAX_CHARACTERS = 4_000
# Names what is done to a text, in the fingerprint of what is made of it. Change it with the rules.
TEXT_RULES = "text/1"

# Controls that end a line or keep words apart, as str.split takes them to.
SEPARATORS = re.compile("[\t-\r\x1c-\x1f\x85\u2028\u2029]")
# Of the Unicode Character Database: controls (Cc), surrogates (Cs), noncharacters, the controls of direction (among
# Bidi_Control), zero-width characters and all others of Default_Ignorable_Code_Point, and interlinear annotations.
UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ud800-\udfff\ufdd0-\ufdef\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


class Candidate(NamedTuple):
    """What is taken of a text: at most MAX_CHARACTERS of it, cleaned; and whether it was too long to be a caption."""

    text: str
    too_long: bool


def candidate_text(text: str | None) -> Candidate:
    """The candidate that a delivered text is; of one that is too long, its beginning."""
    text = text or ""
    return Candidate(clean_text(text[:MAX_CHARACTERS]), len(text) > MAX_CHARACTERS)


def clean_text(text: str) -> str:
    """The text with a space for each control that separates, and without what cannot be seen."""
    if text.isascii() and text.isprintable():
        return text
    return UNSEEN.sub("", SEPARATORS.sub(" ", text))
