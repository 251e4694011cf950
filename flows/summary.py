"""What commands show people: the numbers of a round or of many, where all lies, and questions in SQL."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blip_core.config import BootstrapConfig
from blip_core.corpus.export import ExportSummary
from blip_core.corpus.export_format import LEFT_OUT
from blip_core.corpus.query import run_query
from blip_core.evaluation.report import build_report
from blip_core.workspace import Workspace
from flows.tables import print_rows

EXAMPLES = {
    "Who wrote the corpus?": """
SELECT source, count(*) AS texts, round(avg(itm_score), 3) AS mean_itm_score
FROM corpus GROUP BY source ORDER BY source""",
    "What would other thresholds keep?": """
SELECT threshold, count(*) FILTER (source = 'web') AS web, count(*) FILTER (source = 'synthetic') AS synthetic
FROM annotations, (SELECT unnest([0.1, 0.5, 0.9, 0.99]) AS threshold)
WHERE itm_score > threshold GROUP BY threshold ORDER BY threshold""",
    "Which web texts did the Captioner replace?": """
SELECT web.text AS web_text, web.itm_score AS web_score, synthetic.text AS synthetic_text,
    synthetic.itm_score AS synthetic_score
FROM annotations AS web JOIN corpus AS synthetic USING (uid)
WHERE web.source = 'web' AND synthetic.source = 'synthetic' AND web.itm_score < 0.5
ORDER BY web_score, uid LIMIT 5""",
}


CLEAN_EXAMPLE = "SELECT url, text, source, itm_score FROM corpus ORDER BY itm_score DESC LIMIT 10"


def clean_numbers(config: BootstrapConfig) -> dict[str, Any]:
    """The round's report, JSON-like, with `corpus` and `html`, where both lie, and `query`, an example in SQL."""
    workspace = Workspace.existing(config.workspace)
    made = workspace.round(config.round)
    places = {"corpus": str(made.corpus), "html": str(made.report), "query": CLEAN_EXAMPLE}
    return build_report(workspace, config.round) | places


def print_clean_summary(config: BootstrapConfig) -> None:
    """Prints the end of `capfilt clean` on stdout."""
    numbers = clean_numbers(config)
    console = Console(highlight=False)
    console.print(_clean_table(numbers))
    console.print(f"corpus: {numbers['corpus']}", markup=False, soft_wrap=True)
    console.print(f"report: {numbers['html']}", markup=False, soft_wrap=True)
    console.print(f'capfilt query --workspace {config.workspace} "{numbers["query"]}"', markup=False, soft_wrap=True)


def _clean_table(numbers: dict[str, Any]) -> Table:
    table = Table(title=f"Round {numbers['round']}")
    table.add_column("number")
    table.add_column("value", justify="right")
    download, sources, scores = numbers["download"], numbers["by_source"], numbers["scores"]
    counts = {"rows": download["rows"], "images": download["ok"], "failed": download["failed"]}
    counts |= {f"failed, {reason}": count for reason, count in download["reasons"].items()}
    _add_counts(table, counts)
    for source in ("web", "synthetic"):
        candidates, kept = (sources[source][key] for key in ("candidates", "accepted"))
        share = f" ({kept / candidates:.1%})" if candidates else ""
        table.add_row(f"{source} texts", f"{candidates:,}")
        table.add_row(f"{source} texts kept", f"{kept:,}{share}")
        for name in ("itm_score", "itc_score"):
            table.add_row(f"{source} texts, mean {name}", _fraction(scores[source][name]))
    if numbers["human"]:
        table.add_row("human pairs", f"{numbers['human']:,}")
    _add_counts(table, {f"unscored, {reason}": count for reason, count in numbers["unscored"].items()})
    speed = numbers["images_per_second"]
    table.add_row("images/s, annotation", "unknown" if speed is None else f"{speed:.3g}")
    for step, seconds in numbers["seconds"].items():
        table.add_row(f"seconds, {step}", f"{seconds:,.1f}")
    return table


def _add_counts(table: Table, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    table.add_section()


def print_summary(config: BootstrapConfig) -> None:
    """Prints the end of the demo on stdout."""
    console = Console(highlight=False)
    workspace = Workspace.existing(config.workspace)
    console.print(_numbers(build_report(workspace, config.round)))
    console.print(f"report: {workspace.round(config.round).report}", soft_wrap=True)
    for question, sql in EXAMPLES.items():
        console.print(f"\n[bold]{question}[/bold]")
        console.print(f'capfilt query --workspace {config.workspace} "{sql.strip()}"', markup=False, soft_wrap=True)
        print_rows(run_query(workspace, sql), console)


def _numbers(report: dict[str, Any]) -> Table:
    table = Table(title=f"Round {report['round']}")
    table.add_column("number")
    table.add_column("value", justify="right")
    for name in ("images", "candidates", "accepted"):
        table.add_row(name, f"{report[name]:,}")
    for name in ("web_noise", "corpus_noise", "filter_auc"):
        table.add_row(name, _fraction(report[name]))
    table.add_section()
    for model, title in (("retrained-raw", "retrained on raw web pairs"), ("retrained", "retrained on the corpus")):
        recall = report["retrieval"].get(model, {}).get("text_to_image", {}).get("r1")
        table.add_row(f"text-to-image R@1, {title}", _fraction(recall))
        table.add_row(f"CIDEr, {title}", _fraction(report["captioning"].get(model, {}).get("cider")))
    table.add_section()
    for step, seconds in report["seconds"].items():
        table.add_row(f"seconds, {step}", f"{seconds:.1f}")
    return table


def print_rounds_table(rounds: list[dict[str, Any]]) -> None:
    """Prints a row for each round on stdout, and below them the reasons for what became of them.

    Noise is by the truth, or where that is not known by hand, or else by the Filter.
    """
    table = Table()
    for column in ("round", "state", "images", "texts", "noise", "T2I R@1", "BLEU-4", "CIDEr"):
        table.add_column(column, justify="left" if column == "state" else "right")
    for row in rounds:
        said = (row[name] for name in ("corpus_noise", "audited_noise", "estimated_noise"))
        noise = next((value for value in said if value is not None), None)
        scores = [_fraction(value) for value in (noise, row["text_to_image_r1"], row["bleu4"], row["cider"])]
        table.add_row(str(row["round"]), row["state"], *(f"{row[name]:,}" for name in ("images", "kept")), *scores)
    console = Console(highlight=False)
    console.print(table)
    for row in rounds:
        if row["why"]:
            console.print(f"round {row['round']}, {row['state']}: {row['why']}", markup=False, soft_wrap=True)
        if row["audited_noise"] is not None:
            value, low, high = (100 * row[f"audited_noise{end}"] for end in ("", "_low", "_high"))
            by_hand = f"{value:.1f}% of the corpus's texts are wrong (95% interval {low:.1f} to {high:.1f}%)"
            console.print(f"round {row['round']}, marked by hand: {by_hand}", markup=False, soft_wrap=True)


def print_sweep(rows: list[dict[str, Any]]) -> None:
    """Prints a row for each predicate on stdout, and below it the pairs at the edges."""
    table = Table()
    for column in ("where", "images", "web", "synthetic", "rejected", "estimated noise"):
        table.add_column(column, justify="left" if column == "where" else "right", overflow="fold")
    for row in rows:
        counts = (f"{row[name]:,}" for name in ("images", "web", "synthetic", "rejected"))
        table.add_row(escape(row["where"]), *counts, _fraction(row["estimated_noise"]))
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        for title, which in (("kept last", "least_kept"), ("rejected first", "most_rejected")):
            for pair in row.get(which, []):
                said = f"{pair['itm_score']:.4f} {pair['source']} {pair['text']!r} {pair['url']!r}"
                console.print(f"{row['where']}, {title}: {said}", markup=False, soft_wrap=True)


def _fraction(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def print_export(summary: ExportSummary) -> None:
    """Prints what an export holds, and what it could not hold, on stdout."""
    console = Console(highlight=False, soft_wrap=True)
    what = "uids" if summary.format == "uids" else "pairs"
    size = f"{summary.files:,} files, {summary.bytes / 1e6:,.1f} MB"
    standing = summary.files - summary.written
    stood = f", {standing:,} of which stood" if standing else ""
    console.print(f"{summary.pairs:,} {what} of round {summary.round} in {size}{stood}: {summary.folder}", markup=False)
    for reason, rows in summary.left_out.items():
        if rows:
            console.print(f"{rows:,} left out, {reason}: {LEFT_OUT[reason]}", markup=False)
