"""The whole cycle on the embedded synthetic web, whose truth is known."""

from pathlib import Path

from prefect import flow

from blip_core.config import BootstrapConfig
from blip_core.scenes.server import serve_scenes
from blip_core.scenes.web import ScenesConfig
from flows.bootstrap import bootstrap
from tasks.scenes import make_scenes, write_url_table

_SCENES = ScenesConfig()


@flow(name="demo")
def demo(config: BootstrapConfig, scenes: ScenesConfig = _SCENES) -> None:
    """Makes a synthetic web in the folder of the URL table, serves it on loopback, and runs the cycle on it."""
    paths = make_scenes(str(Path(config.web.paths[0]).parent), scenes)
    with serve_scenes(paths.folder) as address:
        write_url_table(paths, address, config.web.paths[0])
        bootstrap(config)
