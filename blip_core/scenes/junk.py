"""Alt texts that describe nothing, of the kinds that real web pages have: file names, adverts, dates, numbers.

Some use the words of the grammar, so that a filter cannot tell junk by its vocabulary alone.
"""

from collections.abc import Callable

import numpy as np

from blip_core.scenes.grammar import COLOURS, SHAPES

GOODS = ("shoes", "phone cases", "sofas", "watches", "t shirts", "posters", "curtains", "car parts")
WORDS = ("image", "photo", "picture", "logo", "banner", "thumbnail", "untitled", "click here", "placeholder")
MONTHS = ("january", "march", "may", "july", "august", "october", "december")


def draw_junk(rng: np.random.Generator) -> str:
    """A random junk text; it is never a caption of the grammar."""
    return FORMS[rng.integers(len(FORMS))](rng)


def _camera_file(rng: np.random.Generator) -> str:
    name = ("IMG_{:04d}.JPG", "DSC{:05d}", "DSCN{:04d}.jpg", "P10{:05d}.JPG", "photo-{}.jpeg")[rng.integers(5)]
    return name.format(rng.integers(1, 9999))


def _screenshot(rng: np.random.Generator) -> str:
    return f"screenshot-{rng.integers(2008, 2026)}-{rng.integers(1, 13):02d}-{rng.integers(1, 29):02d}.png"


def _advert(rng: np.random.Generator) -> str:
    goods = rng.choice(GOODS)
    form = ("buy cheap {} online free shipping", "best {} {} sale up to {} off", "{} | official store | low prices")
    return form[rng.integers(3)].format(goods, rng.integers(2015, 2026), f"{rng.integers(1, 10) * 10}%")


def _clipart(rng: np.random.Generator) -> str:
    forms = (
        "{} {} clipart free download",
        "{} {} icon png transparent background",
        "download {} {} vector {}",
        "{} {} sticker {} pack",
        "stock photo {} {} {}",
        "{}-{}-large-{}.jpg",
    )
    return forms[rng.integers(6)].format(rng.choice(tuple(COLOURS)), rng.choice(SHAPES), rng.integers(1, 999))


def _date(rng: np.random.Generator) -> str:
    return f"{rng.integers(1, 29)} {rng.choice(MONTHS)} {rng.integers(2001, 2026)}"


def _word(rng: np.random.Generator) -> str:
    return str(rng.choice(WORDS))


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10, 10_000_000))


FORMS: tuple[Callable[[np.random.Generator], str], ...] = (
    _camera_file,
    _screenshot,
    _advert,
    _clipart,
    _date,
    _word,
    _number,
)
