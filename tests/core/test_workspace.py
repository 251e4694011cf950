"""The workspace: what a preview promises, opening does; and the accounts of a round."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from blip_core.errors import WorkspaceError
from blip_core.files import read_json
from blip_core.workspace import Workspace


def test_a_preview_of_a_workspace_makes_nothing_and_is_the_one_that_opens(tmp_path: Path) -> None:
    preview = Workspace.preview(tmp_path / "deep" / "work")
    assert list(tmp_path.iterdir()) == []
    assert preview == Workspace.open(tmp_path / "deep" / "work")
    assert Workspace.preview(preview.root) == preview
    assert list(preview.root.iterdir()) == []


def test_a_place_where_no_workspace_can_be_is_refused_by_both(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for refused in (tmp_path / "file" / "work", tmp_path / "file"):
        for look in (Workspace.preview, Workspace.open):
            with pytest.raises(WorkspaceError, match="workspace "):
                look(refused)


def test_seconds_and_images_of_a_step_sum_up_over_its_runs(tmp_path: Path) -> None:
    made = Workspace.open(tmp_path).round(1)
    for seconds, images in ((1.5, 10), (2.25, 30)):
        made.add_seconds("annotate", seconds)
        made.add_images("annotate", images)
    assert read_json(made.seconds) == {"annotate": 3.75}
    assert read_json(made.images) == {"annotate": 40}


def test_no_addition_is_lost_among_processes(tmp_path: Path) -> None:
    script = """
        import sys
        from blip_core.workspace import Workspace
        made = Workspace.open(sys.argv[1]).round(1)
        for _ in range(25):
            made.add_images("annotate", 1)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    writers = [subprocess.Popen(command) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert read_json(Workspace.open(tmp_path).round(1).images) == {"annotate": 100}
