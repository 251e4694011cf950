"""From a URL table to shards."""

from prefect import flow

from blip_core.config import BootstrapConfig
from flows.shards import over_shards, threads
from tasks import progress
from tasks.download import download_batch, download_shard, plan_retry, plan_shards
from tasks.warned import counted_warnings

# The next shard's processes start while this one's last slow hosts are waited for.
_WINDOW = 2


@flow(name="download", task_runner=threads(_WINDOW))
def download(config: BootstrapConfig, retry_failed: bool = False) -> None:
    """Fetches the images of the URL table into shards; those that stand are not fetched again.

    Args:
        config: the round.
        retry_failed: try again only what failed in shards for a passing reason; what is settled then comes into further
            shards.
    """
    with counted_warnings("download"):
        plan = plan_retry(config) if retry_failed else plan_shards(config)
        progress.begin("download", plan.rows, plan.rows - plan.missing)
        over_shards("download", download_shard, config, plan.names, _WINDOW, download_batch)
