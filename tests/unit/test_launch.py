"""The shell side: scripts parse, mistakes are one line and exit code 2, exit codes of ranks are passed on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.sh"), ROOT / ".ci" / "run"])

RANK = """
import os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
if what == "mistake" and rank == 0:
    sys.exit(2)
if what == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what != "fine":
    time.sleep(60)
"""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    cleared = {k: v for k, v in os.environ.items() if not k.startswith(("MEGARL_", "SLURM_")) and k not in ("NPROC", "NNODES", "NODE_RANK")}
    return subprocess.run(command, env=cleared | environment, capture_output=True, text=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_at_the_first_failure(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    if script.name not in ("env.sh", "container.sh"):  # sourced: the caller decides
        assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MEGARL_PYTHON": "/nowhere/python"}, "not a Python interpreter"),
        ({"MEGARL_STACK": "tpu"}, "expected cpu or gpu"),
        ({"MEGARL_VENV": "/usr"}, "not a virtual environment"),
        ({"MEGARL_VENV": "/proc/no"}, "set MEGARL_VENV"),
    ],
)
def test_install_refuses_in_one_line(tmp_path: Path, environment: dict[str, str], expected: str) -> None:
    done = run(["bash", "launch/install.sh"], **({"MEGARL_VENV": str(tmp_path / "venv")} | environment))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("megarl: ") and expected in done.stderr
    assert not (tmp_path / "venv").exists()


def test_install_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    done = run(["bash", "launch/install.sh"], MEGARL_VENV=str(tmp_path / "venv"), MEGARL_PYTHON=str(old))
    assert done.returncode == 2 and "is Python 3.9; megarl needs Python 3.11 or 3.12" in done.stderr


def test_install_leaves_a_directory_of_the_user_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = run(["bash", "launch/install.sh"], MEGARL_VENV=str(tmp_path))
    assert done.returncode == 2 and [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_install_without_an_index_is_one_clear_line_every_time(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}
    for _ in range(2):  # the second call finds what the first one left
        done = run(["bash", "launch/install.sh"], MEGARL_VENV=str(tmp_path / "venv"), no_proxy="*", **nowhere)
        progress, fault = done.stderr.splitlines()
        assert done.returncode == 2 and progress == "megarl: installing torch (1/4)"
        assert "no package index answers (offline?)" in fault and "install.log" in fault


@pytest.mark.parametrize(("what", "code", "line"), [("fine", 0, ""), ("mistake", 2, ""), ("killed", 137, "rank 1")])
def test_launcher_passes_on_how_ranks_ended(tmp_path: Path, what: str, code: int, line: str) -> None:
    (tmp_path / "rank_program.py").write_text(RANK)
    done = run(
        ["bash", "launch/torchrun.sh", what],
        MEGARL_VENV="none",
        MEGARL_PYTHON=sys.executable,
        MEGARL_MODULE="rank_program",
        PYTHONPATH=str(tmp_path),
        NPROC="2",
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr
    assert line in done.stderr and done.stderr.count("\n") == bool(line)


@pytest.mark.parametrize("environment", [{"NPROC": "four"}, {"NNODES": "2"}])
def test_launcher_refuses_in_one_line(environment: dict[str, str]) -> None:
    done = run(["bash", "launch/torchrun.sh", "ppo", "x.yaml"], MEGARL_VENV="none", MEGARL_PYTHON=sys.executable, **environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("megarl: ")
