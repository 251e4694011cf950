"""What `capfilt demo` ends with: the round's numbers, the report's path, and three questions asked in SQL."""

from typing import Any

from rich.console import Console
from rich.table import Table

from blip_core.config import BootstrapConfig
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


def _fraction(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
