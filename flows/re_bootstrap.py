"""A new round: what is new on the web, by the models at hand or by better ones, promoted when it is no worse."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.annotate import annotate
from flows.approval import ask_for_approval
from flows.download import download
from flows.evaluation import evaluation
from flows.finetune import finetune
from flows.pretrain import pretrain
from flows.publish import publish
from flows.report import report
from flows.retrain import retrain
from tasks.rounds import begin_round, conclude_round, judge_round


@flow(name="re-bootstrap")
def re_bootstrap(config: BootstrapConfig) -> None:
    """Makes the next round, or goes on with the one that is undecided; its number is chosen, not configured.

    It takes in only new URLs and images, annotates what these models have not, publishes a candidate, and promotes it
    when the gate, and where `rounds.approval` says so a person, let it. A round that is not promoted fails the run.
    """
    plan = begin_round(config)
    if not plan.judged:
        download(plan.config)
        if plan.pretrains:
            pretrain(plan.config)
        if plan.finetunes:
            finetune(plan.config)
        annotate(plan.config)
        publish(plan.config)
        if config.rounds.retrain:
            retrain(plan.config)
        evaluation(plan.config)
        report(plan.config)
        judge_round(plan.config)
    ask_for_approval(plan.config)
    conclude_round(plan.config)
