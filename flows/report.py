"""The report of a round, as one HTML file and as Prefect artifacts."""

from prefect import flow

from blip_core.config import BootstrapConfig
from tasks.publish import build_catalog
from tasks.report import show_numbers, show_pictures, show_report, show_scores, write_report
from tasks.warned import counted_warnings


@flow(name="report")
def report(config: BootstrapConfig) -> None:
    """Writes report.html and puts the round's numbers and pictures where the Prefect UI shows them."""
    with counted_warnings("report"):
        build_catalog(config)
        write_report(config)
        show_report(config)
        show_numbers(config)
        show_scores(config)
        show_pictures(config)
