"""SIGKILL in the middle of an import or of forgetting an encrypted agent: whole or not there, and never half readable."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem.blockpool.verify import verify
from agentmem.errors import AgentLocked
from tests.runtime.agents import LONG, cached, extents, open_runtime, turn

pytestmark = pytest.mark.slow  # a process of its own for each

ACT = """
import sys
from pathlib import Path
from agentmem.blockpool.failpoint import arm
from tests.runtime.agents import open_runtime
home, archive, point = sys.argv[1:]
runtime = open_runtime(Path(home))
arm(point)
if archive:
    with open(archive, "rb") as file:
        runtime.transfer.admit(file)
else:
    runtime.forget("ada")
"""
ROOT = Path(__file__).resolve().parents[2]


def killed(home: Path, archive: Path | str, point: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ACT, str(home), str(archive), point], cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, f"{point} was not passed"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    runtime = open_runtime(folder / "home")
    turn(runtime, "ada", LONG)
    with runtime.transfer.export("ada") as file:
        (folder / "ada").write_bytes(file.read())
    runtime.close()
    return folder / "ada"


def import_killed_at(home: Path, archive: Path, point: str) -> None:
    runtime = open_runtime(home)
    turn(runtime, "eve", "hello")
    runtime.close()
    before = extents(home)
    killed(home, archive, point)
    runtime = open_runtime(home)
    there = [a["agent"] for a in runtime.agents()]
    assert there == (["ada", "eve"] if point == "index.committed" else ["eve"])
    assert cached(turn(runtime, "eve", "still there?")) > 0
    if "ada" not in there:
        assert set(before) <= set(extents(home))
        assert len(extents(home)) <= len(before) + 1, "the import left an extent"
        with archive.open("rb") as file:
            assert runtime.transfer.admit(file)["kept"] == "state"
    assert cached(turn(runtime, "ada", "go on")) > 300
    runtime.close()
    report = verify(home / "store", deep=True)
    assert report.ok, report
    assert report.orphans == []
    assert not list((home / "store").rglob("*.tmp"))


@pytest.mark.parametrize(
    "point",
    [
        "file.begin",
        "file.written",
        "file.synced",
        "file.renamed",
        "file.durable",
        "index.begin",
        "index.changed",
        "index.committed",
    ],
)
def test_an_import_killed_anywhere(tmp_path: Path, archive: Path, point: str) -> None:
    import_killed_at(tmp_path / "home", archive, point)


@pytest.mark.parametrize("point", ["index.begin", "forget.committed"])
def test_forgetting_begins_with_the_key(tmp_path: Path, point: str) -> None:
    home = tmp_path / "home"
    runtime = open_runtime(home, encrypt="file")
    turn(runtime, "ada", LONG)
    turn(runtime, "bob", LONG)
    runtime.close()
    killed(home, "", point)
    assert len(list((home / "keys").iterdir())) == 1
    runtime = open_runtime(home)
    if point == "index.begin":
        assert [a["locked"] for a in runtime.agents()] == [True, False]
        with pytest.raises(AgentLocked):
            turn(runtime, "ada", "hello?")
        runtime.forget("ada")
    assert [a["agent"] for a in runtime.agents()] == ["bob"]
    assert cached(turn(runtime, "bob", "still there?")) > 300
    runtime.close()
    report = verify(home / "store", deep=True)
    assert report.ok, report
