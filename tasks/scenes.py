"""The synthetic web of the demo: its pictures and tables, and the URL table for the address it is served at."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from blip_core.scenes import web


@task(name="make-scenes", task_run_name="make-scenes", cache_policy=NO_CACHE)
def make_scenes(folder: str, scenes: web.ScenesConfig) -> web.ScenesPaths:
    """Draws the pictures and writes the tables; does nothing where they stand."""
    return web.make_scenes(Path(folder), scenes)


@task(name="write-url-table", task_run_name="write-url-table", cache_policy=NO_CACHE)
def write_url_table(paths: web.ScenesPaths, address: str, target: str) -> None:
    """Writes the URL table of the web as it is served now."""
    web.url_table(paths, address, Path(target))
