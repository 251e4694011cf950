"""A person's approval: the run waits, and whoever resumes it in Prefect's UI sees the table and the pictures there.

A run of a deployment is suspended: its process ends, and after the answer the flow runs from the top, where the
round's verdict tells it that all is made. Any other run, such as the command line's, stays and asks the server.
"""

from typing import Literal

from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from prefect.utilities.urls import url_for
from pydantic import Field

from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError
from tasks import progress
from tasks.report import pictures_page
from tasks.rounds import record_decision, verdict_page, waits_for_approval

_WAIT_SECONDS = 7 * 24 * 3600
_LOOK_SECONDS = 5


class Decision(RunInput):
    """What the resume form asks for."""

    decision: Literal["approve", "reject"] = Field(description="whether the round takes the promoted one's place")
    comment: str = Field("", description="why; it is kept with the round's verdict")


def ask_for_approval(config: BootstrapConfig) -> None:
    """Where the round waits for approval, waits for it too, and records it. To be called within the flow itself.

    Raises CapfiltError where nobody has answered for a week.
    """
    if not waits_for_approval(config):
        return
    page = f"# Round {config.round}\n\n{verdict_page(config)}\n\n{pictures_page(config)}"
    form = Decision.with_initial_data(description=page)
    address = url_for("flow-run", obj_id=str(flow_run.id)) or f"the run {flow_run.id}"
    progress.say(f"re-bootstrap: round {config.round} waits for approval; resume the run at {address}")
    answer = _answer(form, f"approve-round-{config.round}")
    record_decision(config, answer.decision == "approve", answer.comment)


def _answer(form: type[Decision], key: str) -> Decision:
    # A part of another run cannot be suspended, nor one without a deployment that would start it again.
    if deployment.id is not None and flow_run.parent_flow_run_id is None:
        return suspend_flow_run(wait_for_input=form, key=key)
    try:
        return pause_flow_run(wait_for_input=form, key=key, timeout=_WAIT_SECONDS, poll_interval=_LOOK_SECONDS)
    except FlowPauseTimeout as error:
        raise CapfiltError(
            "nobody has approved or rejected the round for a week; it stands, and the same command asks again"
        ) from error
