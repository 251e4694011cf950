"""Charts by matplotlib: for the report as inline SVG that takes the page's own text colour, light or dark; for pages
that are not ours as pictures that travel inside them.

The same numbers give the same SVG.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "web": "#c2703d",
    "synthetic": "#3d7fc2",
    "itc": "#3d7fc2",
    "itm": "#c2703d",
    "lm": "#4f9a5b",
}
PIXELS_PER_INCH = 104  # as wide as the page at 9.6 inches
PICTURE_PIXELS_PER_INCH = 160
INK = "#123456"  # stands for the page's text colour until the SVG is done
PICTURE_INK = "#23262b"  # on white: what is around a picture may be light or dark

Form = Literal["svg", "picture"]

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
}
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


def score_histogram(bins: Mapping[str, Sequence[int]], form: Form = "svg") -> str:
    """Counts of equal bins of itm_score from 0 to 1, one outline for each source; a picture is a `data:` URI."""
    with mpl.rc_context(_style(form, "histogram")):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for source, counts in bins.items():
            edges = [place / len(counts) for place in range(len(counts) + 1)]
            axes.stairs(counts, edges, fill=True, alpha=0.25, color=COLOURS[source])
            axes.stairs(counts, edges, color=COLOURS[source], linewidth=1.4, label=f"{source} texts")
        axes.set(xlim=(0, 1), ylim=(0, None), xlabel="itm_score, the Filter's probability of 'match'")
        axes.set_ylabel("texts")
        axes.legend(loc="upper center")
        title = "Histogram of itm_score for web and synthetic texts"
        return _svg(figure, title) if form == "svg" else _picture(figure)


def training_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A panel for each model: its objectives' losses by step."""
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    with mpl.rc_context({**_style("svg", "curves"), "font.size": 9}):
        figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
        for place, (model, lines) in enumerate(metrics.items()):
            axes = figure.add_subplot(rows, columns, place + 1)
            _panel(axes, model, lines)
        drawn = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(list(drawn.values()), list(drawn), loc="outside upper center", ncols=max(1, len(drawn)))
        return _svg(figure, "Training losses of each model by step")


def loss_curve(model: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """The losses of one model by step, large enough to be looked at alone: a picture as `data:` URI."""
    with mpl.rc_context(_style("picture", "curve")):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        _panel(axes, model, lines)
        axes.set(xlabel="step", ylabel="loss")
        figure.legend(loc="outside upper right", ncols=len(COLOURS))
        return _picture(figure)


def _panel(axes: Axes, model: str, lines: Sequence[Mapping[str, Any]]) -> None:
    for objective in ("itc", "itm", "lm"):
        points = [(line["step"], line[objective]) for line in lines if line.get(objective) is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, color=COLOURS[objective], linewidth=1.2, label=objective.upper())
    axes.set_title(model, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=4)


def _style(form: Form, salt: str) -> dict[Any, Any]:
    ink = INK if form == "svg" else PICTURE_INK
    return {**STYLE, **dict.fromkeys(INKED, ink), "svg.hashsalt": salt}


def _picture(figure: Figure) -> str:
    """The drawing as a `data:` URI of a PNG."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=PICTURE_PIXELS_PER_INCH, metadata={"Software": None})
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


def _svg(figure: Figure, title: str) -> str:
    """The drawing as an HTML5 inline element: no declarations, no links, no ids but those that are referred to."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # would rule the whole page
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' id="(?!p[0-9a-f]{10}|m[0-9a-f]{10})[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    widest = f"max-width: {round(figure.get_figwidth() * PIXELS_PER_INCH)}px"
    attributes = f'role="img" aria-label="{title}" style="{widest}"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', attributes, svg, count=1).strip()
