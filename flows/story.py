"""What `capfilt explain` shows people. All texts are the web's: they are printed as they stand, escaped."""

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console


def print_story(story: dict[str, Any]) -> None:
    """Prints what `blip_core.corpus.explain` found, on stdout."""
    console = Console(highlight=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    say(f"image {story['uid']!r}")
    for image in story["images"]:
        say(f"shard {image['shard']}: {image['url']!r}")
        say(f"  web text {image['caption']!r}")
        say(f"  {_fetched(image)}")
    for pair in story["human"]:
        say(f"human text {pair['text']!r}, of the image {pair['image_sha256']}")
    for made in story["rounds"]:
        others = "".join(f", {key} {json.dumps(value)}" for key, value in made["rules"].items())
        rule = f"keeps where {made['where']}{others}"
        shown = ", the promoted one," if made["promoted"] else ""
        say(f"round {made['round']}{shown} {rule if made['where'] else 'is not published'}")
        for row in made["candidates"]:
            say(f"  {_verdict(row['kept'])} {row['source']} {row['candidate']}: {row['text']!r}")
            say(f"    {_scores(row)}; {row['why']}")
    for digest, how in story["trained"].items():
        say(f"trained on it: {digest} ({how})")
    for digest, model in story["models"].items():
        known = ", ".join(f"{key} {shown}" for key, value in model.items() if (shown := _known(value)))
        say(f"model {digest}: {known or 'lies in no round of this workspace'}")
    for made in story.get("replay", []):
        for line in _replayed(made):
            say(line)


def _fetched(image: dict[str, Any]) -> str:
    if image["status"] != "ok":
        return f"failed: {image['reason']}"
    size = f"{image['width']} x {image['height']} pixels"
    fetched = f"{image['original_width']} x {image['original_height']} as fetched"
    return f"{size} ({fetched}), sha256 {image['sha256']}"


def _verdict(kept: bool | None) -> str:
    return {True: "kept", False: "rejected", None: "undecided"}[kept]


def _scores(row: dict[str, Any]) -> str:
    scores = (f"{name} {row[name]:.4f}" for name in ("itm_score", "itc_score", "logprob") if row[name] is not None)
    seed = f", seed {row['seed']}" if row["seed"] is not None else ""
    captioner = f", by the Captioner {row['captioner']}" if row["source"] == "synthetic" else ""
    return f"{', '.join(scores) or 'no scores'}, by the Filter {row['filter']}{captioner}{seed}"


def _replayed(made: dict[str, Any]) -> Iterator[str]:
    """What came out when a round's texts and scores were computed again."""
    settings = f"{made['precision']}, scores may differ by {made['tolerance']}"
    yield f"computed again, round {made['round']}, shard {made['shard']}: {settings}"
    if not made["generation_recorded"]:
        yield "  the part does not say how its captions were decoded; the default settings were taken"
    if not made["image_agrees"]:
        yield "  the image's bytes are not those that were annotated"
    for row in made["candidates"]:
        yield f"  {'agrees' if row['agrees'] else 'differs'}: {row['source']} {row['candidate']}{_differences(row)}"
        if not row["text_agrees"]:
            yield f"    the text came out as {row['text']!r}"
        if not row["reason_agrees"]:
            yield f"    the reason for no scores came out as {row['reason'] or 'none'}"


def _differences(row: dict[str, Any]) -> str:
    known = {name: difference for name, difference in row["differences"].items() if difference is not None}
    return "".join(f", {name} by {difference:+.1e}" for name, difference in known.items())


def _known(value: Any) -> str:
    """A model that began with weights of others names those of image and text; without them, it is from scratch."""
    values = value if isinstance(value, list) else [value]
    return " and ".join(str(one) for one in values if one is not None)
