"""The engine `ray` of the annotation: one actor for each GPU of a Ray cluster, or each core where there is none.

An actor loads its models once and takes shard after shard (a Ray task with a GPU would get a new process, and load
them, every time). An actor that dies is replaced, and its shard given out again.
"""

from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.capfilt.parts import AnnotationSummary, FailedShard
from blip_core.cluster import connected, resources
from blip_core.config import BootstrapConfig
from blip_core.errors import CapfiltError, ConfigError
from tasks import progress
from tasks.annotate import work_through
from tasks.annotate_batch import annotate_names
from tasks.models import load_models

_QUIET_SECONDS = 60.0

Result = AnnotationSummary | FailedShard


class Annotating:
    """What an actor does, in a process of its own on some node."""

    def __init__(self, config: BootstrapConfig) -> None:
        self.config = config

    def load(self) -> None:
        """Loads the models. Raises CheckpointError as `load_models` does."""
        load_models(self.config)

    def annotate(self, name: str) -> Result:
        """Annotates one shard."""
        (result,) = annotate_names(self.config, [name])
        return result


@task(name="annotate-on-ray", task_run_name="annotate-on-ray", cache_policy=NO_CACHE)
def annotate_on_ray(config: BootstrapConfig, names: list[str]) -> dict[str, CapfiltError]:
    """Captions and scores some shards on the Ray cluster; returns the failures by shard."""
    with connected(config.scale.ray_address) as ray:
        return work_through(config, _Crew(ray, config, names).results())


class _Crew:
    """The actors at work, and the shards that are left."""

    def __init__(self, ray: Any, config: BootstrapConfig, names: list[str]) -> None:
        self._ray = ray
        self._config = config
        self._left = deque(names)
        self._at_work: dict[Any, tuple[Any, str | None]] = {}  # by the answer that is awaited; None: the models load
        self._deaths: Counter[str | None] = Counter()
        kind = "GPU" if resources(ray, "GPU") else "CPU"
        places = resources(ray, kind)
        self._new = ray.remote(num_cpus=1, num_gpus=int(kind == "GPU"))(Annotating).remote
        size = config.scale.ray_actors or places
        if not 1 <= size <= places:
            raise ConfigError(
                f"scale.ray_actors: {max(size, 1)} actors need a {kind} each, and the Ray cluster has {places}"
            )
        for _ in range(min(size, len(names))):
            self._begin()

    def results(self) -> Iterator[Result]:
        """The shards' results as they come. Raises the error of an actor that cannot load the models."""
        while self._at_work:
            ready, _ = self._ray.wait(list(self._at_work), timeout=_QUIET_SECONDS)
            for answer in ready:
                yield from self._take(answer)
            if not ready and all(name is None for _, name in self._at_work.values()):
                progress.say(
                    f"annotate: {len(self._at_work)} Ray actors wait for a place in the cluster, or load models"
                )

    def _begin(self) -> None:
        actor = self._new(self._config)
        self._at_work[actor.load.remote()] = (actor, None)

    def _take(self, answer: Any) -> Iterator[Result]:
        actor, name = self._at_work.pop(answer)
        try:
            result = self._ray.get(answer)
        except self._ray.exceptions.RayActorError as error:
            yield from self._bury(name, str(error).partition("\n")[0])
            return
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        self._deaths[None] = 0
        if name is not None:
            yield result
        if self._left:
            name = self._left.popleft()
            self._at_work[actor.annotate.remote(name)] = (actor, name)

    def _bury(self, name: str | None, why: str) -> Iterator[Result]:
        """Replaces a dead actor; its shard is given out again, `scale.tries` times at most."""
        self._deaths[name] += 1
        often = f"its Ray actor died, {self._deaths[name]} times ({why})"
        if name is None:
            if self._deaths[name] > self._config.scale.tries:
                raise CapfiltError(f"annotate on Ray: no models loaded; {often}")
        elif self._deaths[name] > self._config.scale.tries:
            yield FailedShard(name, CapfiltError(often))
        else:
            progress.say(f"annotate: shard {name} is given out again; {often}")
            self._left.appendleft(name)
        if self._left:
            self._begin()
