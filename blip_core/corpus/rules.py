"""What `publish` asks of a candidate besides its scores, and the reason that each rule gives for a rejection.

A rule that sees one candidate alone is an expression of SQL over its columns, as `publish.where` is; what is not true
is rejected. They are asked in the order of REJECTIONS, and the first that fails is the reason (docs/selection.md).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from blip_core.errors import ConfigError
from blip_core.settings import Settings, setting

NO_SCORES = "no_scores"
WHERE = "where"
OTHER_LANGUAGE = "other_language"
SAME_IMAGE = "same_image"
NEAR_DUPLICATE = "near_duplicate"
DOMAIN_FULL = "domain_full"
BEST_OF = "best_of"

# By reason, in the order in which the rules are asked.
REJECTIONS = {
    NO_SCORES: "the candidate has no scores; its annotation says why",
    WHERE: "`publish.where` is not true",
    "few_words": "it has fewer words than `text.min_words`",
    "many_words": "it has more words than `text.max_words`",
    "few_characters": "it has fewer characters than `text.min_characters`",
    "many_characters": "it has more characters than `text.max_characters`",
    "repetitive": "more than `text.max_repeated` of its words repeat an earlier one",
    "file_name": "it is a file's name, or a number",
    "markup": "it has markup or a URL in it",
    "small_image": "the image's shorter side is below `images.min_side`",
    "large_image": "the image's longer side is above `images.max_side`",
    "aspect": "the image's longer side is more than `images.max_aspect` times its shorter one",
    OTHER_LANGUAGE: "it is clearly in a language that `text.languages` does not name",
    SAME_IMAGE: "another image has the same bytes, and better texts",
    NEAR_DUPLICATE: "another image looks the same, and has better texts",
    DOMAIN_FULL: "its domain has `images.per_domain` images with better texts",
    BEST_OF: "another synthetic text of the image is better, and best_of keeps one",
}

# A word is what Python's str.split() makes of a text: RE2's \s knows ASCII alone, and not all of it.
WORD = r"[^\s\x0b\x1c-\x1f\x{85}\p{Z}]+"
WORDS = f"regexp_extract_all(text, '{WORD}')"
DISTINCT_WORDS = f"list_distinct(regexp_extract_all(lower(text), '{WORD}'))"

SUFFIXES = "jpe?g|jfif|png|gif|webp|bmp|tiff?|svg|heic|heif|avif|ico|psd|raw|cr2|nef|dng|pdf|mp4|mov|avi"
CAMERAS = (
    "p?img|_mg|dsc[nf]?|dscf|dcim|pxl|mvimg|gopr|dji|sam|cimg|pict?|photo|image|picture|scan|screenshot|untitled|file"
)
FILE_NAME = (
    rf"(?i)(?:[^\n]*[^\s.]\.(?:{SUFFIXES})"  # anything that ends as a picture's file does
    rf"|(?:{CAMERAS})(?:[\s_\-.:()x]|at\b)*\d(?:[\d\s_\-.:()x]|at\b)*(?:wa\d+)?"  # IMG_1234, IMG-20180101-WA0001
    r"|p\d{7}|[\d\s_\-.:()#/]*\d[\d\s_\-.:()#/]*"  # P1010001, 20180101_123456
    r"|[0-9a-f]{16,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"  # digests
)
MARKUP = (
    r"(?i)</?[a-z][^<>]*>|<!--|&(?:[a-z][a-z0-9]{1,30}|#\d{1,7}|#x[0-9a-f]{1,6});"  # HTML
    r"|[a-z][a-z0-9+.\-]{1,15}://|\bwww\.[^\s]"  # URLs
    r"|\[/?(?:url|img|b|i|u|quote|caption|gallery)\b[^\]]*\]|!?\[[^\]]*\]\([^)]*\)"  # BBCode, Markdown
    r"|\{\{|\}\}|\$\{|<\?|\?>|<%|%>|\[\["  # templates and wikis
)


@dataclass(frozen=True)
class TextRules(Settings):
    """Which texts may enter the corpus; every rule is off by default."""

    min_words: int | None = setting(None, "words that a text has at least; null: any number", ge=1)
    max_words: int | None = setting(None, "words that a text has at most; null: any number", ge=1)
    min_characters: int | None = setting(None, "characters that a text has at least; null: any number", ge=1)
    max_characters: int | None = setting(None, "characters that a text has at most; null: any number", ge=1)
    max_repeated: float | None = setting(
        None, "share of a text's words that may repeat an earlier one of it; null: all", ge=0, lt=1
    )
    reject_file_names: bool = setting(False, "rejects a text that is a file's name or a number, such as IMG_1234.jpg")
    reject_markup: bool = setting(False, "rejects a text with HTML, another markup or a URL in it")
    languages: tuple[str, ...] | None = setting(
        None, "ISO 639-1 codes, such as [en, de]: rejects a text that is clearly in another language; null: all stay"
    )


@dataclass(frozen=True)
class ImageRules(Settings):
    """Which images may enter the corpus with their texts; every rule is off by default."""

    min_side: int | None = setting(None, "pixels that the shorter side has at least; null: any number", ge=1)
    max_side: int | None = setting(None, "pixels that the longer side has at most; null: any number", ge=1)
    max_aspect: float | None = setting(
        None, "the longer side is at most so many times the shorter one; null: any", ge=1
    )
    unique: bool = setting(False, "of the round's images with the same bytes, keeps the one with the best text alone")
    near_duplicates: float | None = setting(
        None, "cosine of two images' embeddings from which on they count as the same image; null: none do", gt=0, lt=1
    )
    per_domain: int | None = setting(
        None, "images of one domain that are kept, those with the best texts; null: all", ge=1
    )
    domain: Literal["host", "site"] = setting(
        "host", "what per_domain counts as a domain: the URL's host, or the registered name above it (example.co.uk)"
    )


ANY_TEXT, ANY_IMAGE = TextRules(), ImageRules()


@dataclass(frozen=True)
class PublishConfig(Settings):
    """Which candidates the corpus keeps."""

    where: str = setting(
        "itm_score > 0.5",
        "SQL predicate over the columns of annotations, width and height; what is not true is rejected",
        min_length=1,
    )
    best_of: bool = setting(
        False, "of an image's synthetic texts that pass, keeps the one with the highest itm_score alone"
    )
    text: TextRules = setting(ANY_TEXT, "which texts may enter")  # noqa: RUF009  (it is frozen)
    images: ImageRules = setting(ANY_IMAGE, "which images may enter")  # noqa: RUF009


class Rule(NamedTuple):
    """What a candidate must fulfil."""

    reason: str  # why one that does not is rejected; a key of REJECTIONS
    passes: str  # SQL


def rules_of(config: PublishConfig) -> list[Rule]:
    """The rules that see one candidate alone and are expressions of SQL, in their order."""
    text, images = config.text, config.images
    limits = {
        WHERE: config.where,
        "few_words": text.min_words and f"len({WORDS}) >= {text.min_words}",
        "many_words": text.max_words and f"len({WORDS}) <= {text.max_words}",
        "few_characters": text.min_characters and f"length(text) >= {text.min_characters}",
        "many_characters": text.max_characters and f"length(text) <= {text.max_characters}",
        "repetitive": _repeated(text.max_repeated),
        "file_name": text.reject_file_names and f"NOT regexp_full_match(trim(text), '{FILE_NAME}')",
        "markup": text.reject_markup and f"NOT regexp_matches(text, '{MARKUP}')",
        "small_image": images.min_side and f"least(width, height) >= {images.min_side}",
        "large_image": images.max_side and f"greatest(width, height) <= {images.max_side}",
        "aspect": images.max_aspect and f"greatest(width, height) <= {images.max_aspect!r} * least(width, height)",
    }
    return [Rule(reason, passes) for reason, passes in limits.items() if passes]


def further_rules(config: PublishConfig) -> dict[str, Any]:
    """What is asked besides the predicate, JSON-like: the keys below `publish` that are not the default's."""
    given, default = _keys(asdict(config)), _keys(asdict(PublishConfig()))
    return {key: value for key, value in given.items() if value != default[key] and key != "where"}


def _keys(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted keys of nested sections."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _keys(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def looks_across(images: ImageRules) -> bool:
    """Whether the rules compare images with each other, those of other shards included."""
    return images.unique or images.near_duplicates is not None or images.per_domain is not None


def check_limits(config: PublishConfig) -> None:
    """Raises ConfigError where a rule leaves nothing."""
    limits = {"text.min_words": "max_words", "text.min_characters": "max_characters", "images.min_side": "max_side"}
    for key, upper in limits.items():
        section, _, lower = key.partition(".")
        rules = getattr(config, section)
        least, most = getattr(rules, lower), getattr(rules, upper)
        if least is not None and most is not None and least > most:
            raise ConfigError(f"publish.{key}: {least} is above {section}.{upper}, {most}: nothing would be left")
    if config.text.languages == ():
        raise ConfigError("publish.text.languages: names no language, so nothing would be left; null lets all stay")


def _repeated(most: float | None) -> str | None:
    """A text without a word repeats none."""
    return None if most is None else f"len({WORDS}) - len({DISTINCT_WORDS}) <= {most!r} * len({WORDS})"
