"""How the work of a step is handed out to other processes and machines. No result, and no fingerprint, depends on it.

The engines themselves are in `flows`: this process, child runs in a Prefect work pool, or actors of a Ray cluster.
"""

from dataclasses import dataclass
from typing import Literal

from blip_core.settings import Settings, setting

Engine = Literal["local", "pool", "ray"]


@dataclass(frozen=True)
class ScaleConfig(Settings):
    """How the engines `pool` and `ray` share out the work."""

    shards_per_run: int = setting(16, "pool: shards that one run annotates with the models loaded once", ge=1, le=1000)
    window: int = setting(96, "pool: runs that wait or work at a time; more than the GPUs there are", ge=1, le=200)
    tries: int = setting(3, "how often a run or an actor that died is put back before its step fails", ge=0, le=100)
    poll_seconds: float = setting(5.0, "pool: seconds between looks at the runs", gt=0, le=300)
    ray_address: str = setting(
        "auto", "ray: the cluster; auto: the one that runs here or that RAY_ADDRESS names", min_length=1
    )
    ray_actors: int | None = setting(
        None, "ray: processes that annotate; null: one for each GPU, or for each core where there is none", ge=1
    )
    ray_workers: int = setting(1, "ray: processes of a training, each with a GPU where there are any", ge=1)
