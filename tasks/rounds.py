"""Rounds: which one `re-bootstrap` makes and with what, the gate's verdict on it, and its promotion."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.utilities.urls import url_for

from blip_core.config import BootstrapConfig
from blip_core.corpus import rounds
from blip_core.corpus.catalog import build_catalog
from blip_core.errors import CapfiltError, RoundRejected
from blip_core.evaluation.gate import RoundNumbers, Verdict, judge
from blip_core.evaluation.tables import RoundTables
from blip_core.files import read_json, write_json
from blip_core.workspace import Workspace
from tasks import progress
from tasks.artifacts import Cell, show_table
from tasks.next_round import RoundPlan, preview_round
from tasks.workplace import round_of, workspace_of


@task(name="begin-round", task_run_name="begin-round", cache_policy=NO_CACHE)
def begin_round(config: BootstrapConfig) -> RoundPlan:
    """Chooses the round, records what stands as it begins, and says what it is made with."""
    workspace = workspace_of(config)
    plan = preview_round(config, workspace, flow_run.id)
    _refuse_what_waits(plan, workspace)
    begun = rounds.begin_round(workspace, plan.config.round)
    standing = f"round {begun.promoted} is promoted" if begun.promoted is not None else "no round is promoted yet"
    progress.say(f"re-bootstrap: round {plan.config.round}, begun with {len(begun.shards)} shards; {standing}")
    return plan


@task(name="judge-round", task_run_name="judge-round", cache_policy=NO_CACHE)
def judge_round(config: BootstrapConfig) -> None:
    """Judges the round against the promoted one, and writes its verdict.json."""
    workspace = workspace_of(config)
    promoted = rounds.promoted_round(workspace)
    against = None if promoted in (None, config.round) else promoted
    candidate = _numbers(workspace, config.round)
    verdict = judge(candidate, None if against is None else _numbers(workspace, against), config.rounds)
    waits = verdict.passed and config.rounds.approval == "required"
    write_json(
        round_of(config).verdict,
        {
            "against": against,
            "decided_by": None if waits else "gate",
            "estimated_noise": candidate.estimated_noise,
            "passed": None if waits else verdict.passed,
            "reasons": verdict.reasons,
            "round": config.round,
            "run": flow_run.id,
            "table": [row._asdict() for row in verdict.table],
        },
    )
    _show(config, verdict)


@task(name="record-decision", task_run_name="record-decision", cache_policy=NO_CACHE)
def record_decision(config: BootstrapConfig, approved: bool, comment: str) -> None:
    """Writes what a person decided into verdict.json."""
    made = round_of(config)
    verdict = rounds.read_verdict(made) or {}
    words = f"a person {'approved' if approved else 'rejected'} it"
    reason = f"{words}: {' '.join(comment.split())}" if comment.strip() else words
    reasons = [reason, *verdict["reasons"]] if approved else [reason]
    write_json(made.verdict, verdict | {"passed": approved, "decided_by": "person", "reasons": reasons})


@task(name="conclude-round", task_run_name="conclude-round", cache_policy=NO_CACHE)
def conclude_round(config: BootstrapConfig) -> None:
    """Promotes the round, where its verdict lets it. Raises RoundRejected where it does not."""
    workspace = workspace_of(config)
    verdict = rounds.read_verdict(round_of(config)) or {}
    passed, reasons = verdict["passed"], "; ".join(verdict["reasons"])
    # One that was put back after it was promoted, and then rolled back or followed by another, stays what it is.
    if passed and rounds.round_states(workspace)[config.round].state in ("candidate", "promoted"):
        rounds.promote(workspace, config.round)
    build_catalog(workspace)
    if not passed:
        stays = f"; round {verdict['against']} stays" if verdict["against"] is not None else ""
        progress.say(f"re-bootstrap: round {config.round} is not promoted{stays}: {reasons}")
        raise RoundRejected(f"round {config.round} is made and not promoted{stays}: {reasons}")
    progress.say(f"re-bootstrap: round {config.round} is promoted: {reasons}")


def waits_for_approval(config: BootstrapConfig) -> bool:
    """Whether the round passed the gate and nobody has decided about it yet."""
    verdict = rounds.read_verdict(round_of(config))
    return verdict is not None and verdict["passed"] is None


def verdict_page(config: BootstrapConfig) -> str:
    """The verdict as markdown: the reasons, and the table."""
    verdict = rounds.read_verdict(round_of(config)) or {}
    rows = [_cells(row) for row in verdict["table"]]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{'; '.join(verdict['reasons'])}\n\n{table}"


def _show(config: BootstrapConfig, verdict: Verdict) -> None:
    reasons = "; ".join(verdict.reasons)
    outcome = "passes the gate" if verdict.passed else "does not pass the gate"
    progress.say(f"re-bootstrap: round {config.round} {outcome}: {reasons}")
    rows = [_cells(row._asdict()) for row in verdict.table]
    show_table("round-verdict", rows, f"Round {config.round} {outcome}: {reasons}")


def _cells(row: Mapping[str, Any]) -> dict[str, Cell]:
    passed = {True: "yes", False: "no", None: "not judged"}[row["passed"]]
    numbers = {name: _number(row[name]) for name in ("candidate", "promoted", "limit")}
    return {"criterion": row["name"], **numbers, "passed": passed, "note": row["note"]}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _numbers(workspace: Workspace, number: int) -> RoundNumbers:
    evaluation = workspace.round(number).evaluation
    with RoundTables.open(workspace, number) as tables:
        noise, filters = tables.kept_noise()
    return RoundNumbers(number, read_json(evaluation) if evaluation.exists() else {}, noise, filters)


def _refuse_what_waits(plan: RoundPlan, workspace: Workspace) -> None:
    """A round that waits for approval in another run is not touched: what is approved must be what was shown."""
    verdict = rounds.read_verdict(workspace.round(plan.config.round)) or {}
    if plan.judged or verdict.get("run") is None or verdict["passed"] is not None:
        return
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(verdict["run"])).state
        except ObjectNotFound:
            return
    if state is not None and state.is_paused():
        address = url_for("flow-run", obj_id=verdict["run"]) or f"the run {verdict['run']}"
        raise CapfiltError(
            f"round {plan.config.round} waits for approval: resume {address}, or cancel it to have the round made anew"
        )
