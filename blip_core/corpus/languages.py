"""Which language a text is in, by lingua, whose models come within its wheel (`pip install 'capfilt[languages]'`).

Web texts are short, and a few words tell no language for sure: a text counts as being in another language only where
lingua holds that one for several times as likely as all that are allowed together.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from blip_core.errors import ConfigError

CLEARLY = 3.0  # times as likely
AT_ONCE = 20_000  # texts, whose likelihoods are held together
# Those that most of the web's texts are in. Each that is allowed comes beside them: the more languages there are to
# choose from, the more often a few words of one look like another, and the longer it takes.
COMMON = frozenset(
    {"ar", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nb"}
    | {"nl", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh"}
)


def check_languages(allowed: Sequence[str]) -> None:
    """Raises ConfigError where lingua is missing, or does not know one of the ISO 639-1 codes."""
    known = _known()
    unknown = [code for code in allowed if code not in known]
    if unknown:
        codes = ", ".join(sorted(known))
        raise ConfigError(f"publish.text.languages: {unknown[0]!r} is not among the ISO 639-1 codes {codes}")


def in_other_language(texts: pa.Array, allowed: Sequence[str]) -> pa.Array:
    """For each text whether it is clearly in a language that is not `allowed`; false where nobody can tell.

    Args:
        texts: strings.
        allowed: ISO 639-1 codes.
    """
    check_languages(allowed)
    detector = _detector(tuple(sorted({*COMMON, *allowed})))
    encoded = texts.dictionary_encode()
    distinct: list[str] = encoded.dictionary.to_pylist()
    verdicts: list[bool] = []
    for start in range(0, len(distinct), AT_ONCE):
        found = detector.compute_language_confidence_values_in_parallel(distinct[start : start + AT_ONCE])
        verdicts += [_is_other(likely, frozenset(allowed)) for likely in found]
    return pc.take(pa.array(verdicts, pa.bool_()), encoded.indices)


def _is_other(likely: Any, allowed: frozenset[str]) -> bool:
    """`likely`: lingua's languages of one text, the likeliest first."""
    meant = sum(one.value for one in likely if _code(one.language) in allowed)
    return _code(likely[0].language) not in allowed and likely[0].value > CLEARLY * meant


def _code(language: Any) -> str:
    return str(language.iso_code_639_1.name).lower()


def _known() -> dict[str, Any]:
    try:
        from lingua import Language
    except ImportError as error:
        raise ConfigError("publish.text.languages: needs lingua; pip install 'capfilt[languages]' brings it") from error
    return {_code(language): language for language in Language.all()}


@lru_cache(maxsize=2)
def _detector(codes: tuple[str, ...]) -> Any:
    """Its models take some hundred megabytes, and are read when a text first asks for them."""
    from lingua import LanguageDetectorBuilder

    known = _known()
    return LanguageDetectorBuilder.from_languages(*(known[code] for code in codes)).build()
