"""The command `megarl`: what it prints, how it ends, what it imports, and who speaks when many ranks fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarl import __version__, cli
from megarl.config_file import load_run
from megarl.errors import CheckpointError, ConfigError
from megarl.run_folder import versions, write_run_folder
from tests.unit.tiny_run import write_run, write_shape

ROOT = Path(__file__).parents[2]
COMMANDS = ("ppo", "sft", "reward", "export", "import", "checkpoint", "serve-reward", "version")


def start(*arguments: str, code: str = "", **environment: str) -> subprocess.Popen:
    """`megarl ARGUMENTS` in a process of its own, or the Python `code`."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "megarl", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def finish(process: subprocess.Popen, timeout_s: float = 60) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def test_the_70b_check_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, time; begun = time.process_time()\n"
        "from megarl import cli\n"
        "assert cli.run(['ppo', 'configs/ppo_70b.yaml', '--check']) == 0\n"
        "heavy = {name.split('.')[0] for name in sys.modules} & {'torch', 'megatron', 'vllm', 'transformers', 'numpy'}\n"
        "print('heavy', sorted(heavy), time.process_time() - begun, file=sys.stderr)\n"
    )
    status, out, err = finish(start(code=code))
    assert status == 0, err
    assert "1024 sequences = 4 minibatches x 32 microbatches x 2 sequences x data 4" in out
    assert "check passed: 128 ranks, tp8 pp4 dp4" in out
    word, modules, seconds = err.strip().splitlines()[-1].rsplit(" ", 2)[0], err, float(err.split()[-1])
    assert "heavy []" in modules, word
    assert seconds < 3


def test_a_mistake_is_one_line_and_code_78():
    status, out, err = finish(start("ppo", "configs/ppo_70b.yaml", "parallel.tensr=2", "--check"))
    assert (status, out) == (78, "")
    assert err == "megarl: error: command line: parallel.tensr: unknown key; did you mean parallel.tensor?\n"


def test_a_start_without_ranks_names_the_launcher():
    status, out, err = finish(start("ppo", "configs/ppo_8b.yaml"))
    assert (status, out) == (78, "") and "Traceback" not in err
    assert "8 ranks, but this run was started on 1" in err
    assert "NPROC=8 bash launch/torchrun.sh ppo" in err


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS), []], ids=" ".join)
def test_help_says_what_a_command_takes(capsys, arguments):
    assert cli.run(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: megarl")
    for word in {"export": ["CHECKPOINT", "OUT", "--role"], "import": ["DIR", "OUT"], "ppo": ["CONFIG", "key=value", "--check"]}.get(
        arguments[0] if arguments else "", COMMANDS if arguments in ([], ["--help"]) else []
    ):
        assert word in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["fly"], "invalid choice: 'fly'"),
        (["ppo"], "required: CONFIG"),
        (["ppo", "x.yaml", "--chek"], "unrecognized arguments: --chek"),
        (["ppo", "x.yaml", "--check", "--world", "none"], "expected a whole number"),
        (["export", "x"], "required: OUT"),
        (["version", "more"], "unrecognized arguments: more"),
        (["ppo", "parallel.tensor=2", "x.yaml"], "where the YAML file should be"),
    ],
)
def test_a_wrong_command_line_is_code_2(capsys, arguments, words):
    assert cli.run(arguments) == (78 if "should be" in words else 2)
    assert words in capsys.readouterr().err


def test_overrides_may_follow_flags(tmp_path, capsys):
    path = str(write_run(tmp_path))
    assert cli.run(["ppo", path, "seed=1", "--check", "ppo.lam=0.9", "--world", "8", "ppo.gamma=0.5"]) == 0
    out = capsys.readouterr().out
    assert "seed: 1\n" in out and "lam: 0.9\n" in out and "gamma: 0.5\n" in out and "8 ranks" in out


def test_torchruns_world_is_the_default_of_a_check(tmp_path, capsys, monkeypatch):
    path = str(write_run(tmp_path))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert cli.run(["ppo", path, "--check"]) == 0
    assert "check passed: 8 ranks, tp2 pp2 dp2" in capsys.readouterr().out


def test_versions(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"megarl {__version__}\n"
    assert cli.run(["version"]) == 0
    out = capsys.readouterr().out
    for name in (*versions(), "device", "transformer-engine", "apex"):
        assert name in out


@pytest.mark.parametrize("command", [["export", "nowhere", "out"], ["import", "nowhere", "out"], ["checkpoint", "show", "nowhere"]])
def test_file_commands_refuse_in_one_line(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert cli.run(command) == (78 if command[0] == "import" else 2)
    err = capsys.readouterr().err
    assert err.startswith("megarl: error: ") and "nowhere" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- endings
@pytest.mark.parametrize("error, code", [(RuntimeError("broken part"), 1), (AssertionError("ours"), 1), (KeyboardInterrupt(), 130)])
def test_our_own_mistakes_keep_their_traceback(monkeypatch, capsys, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_version", fail)
    assert cli.run(["version"]) == code
    err = capsys.readouterr().err
    assert ("Traceback" in err) == (code == 1)
    assert "fail" in err if code == 1 else err == "megarl: interrupted\n"


def test_a_failing_rank_leaves_although_threads_live_on():
    code = (
        "import threading, time; threading.Thread(target=time.sleep, args=(120,)).start()\n"
        "from megarl import cli\n"
        "def fail(parsed): raise RuntimeError('broken part')\n"
        "cli._version = fail\n"
        "cli.main(['version'])\n"
    )
    begun = time.monotonic()
    status, _, err = finish(start(code=code, RANK="3", WORLD_SIZE="4", LOCAL_RANK="3"))
    assert status == 1 and time.monotonic() - begun < 30
    assert err.splitlines()[-1] == "[rank 3] RuntimeError: broken part"


def fail_as(monkeypatch, rank: int, error: Exception) -> float:
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "_version", fail)
    monkeypatch.setattr(cli, "SAY_AFTER_S", (0.2, 0.4))
    for name, value in (("RANK", rank), ("WORLD_SIZE", 4), ("LOCAL_RANK", rank % 2)):
        monkeypatch.setenv(name, str(value))
    begun = time.monotonic()
    assert cli.run(["version"]) == error.exit_code
    return time.monotonic() - begun


def test_rank_0_speaks_at_once_and_the_others_wait(monkeypatch, capsys):
    assert fail_as(monkeypatch, 0, CheckpointError("is gone")) < 0.2
    assert capsys.readouterr().err == "megarl: error: is gone\n"
    for rank, wait in ((2, 0.2), (3, 0.4)):
        assert fail_as(monkeypatch, rank, CheckpointError("is gone")) >= wait
        assert capsys.readouterr().err == f"megarl: error on rank {rank}: is gone\n"


def test_every_fault_is_a_line_of_its_own(monkeypatch, capsys):
    fail_as(monkeypatch, 0, ConfigError(["first", "second\nhalf"]))
    assert capsys.readouterr().err == "megarl: error: first\nmegarl: error: second half\n"


def test_a_waiting_rank_that_is_ended_says_nothing():
    process = start("ppo", "nowhere.yaml", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert (status, out, err) == (-signal.SIGTERM, "", "")


# ---------------------------------------------------------------- run folder
def test_the_run_folder_repeats_the_run(tmp_path):
    run = load_run("ppo", write_run(tmp_path), ["seed=5"])
    write_run_folder(run)
    write_run_folder(run)
    assert load_run("ppo", run.output_dir / "config.yaml") == run
    found = json.loads((run.output_dir / "versions.json").read_text())
    assert found["megarl"] == __version__ and found["torch"] != "missing" and found["vllm"] != "missing"
    assert sorted(path.name for path in run.output_dir.iterdir()) == ["config.yaml", "versions.json"]


def test_a_refused_run_leaves_no_folder(tmp_path, capsys):
    path = write_run(tmp_path)
    write_shape(tmp_path / "actor", num_hidden_layers=1)
    assert cli.run(["ppo", str(path)]) == 78
    assert not (tmp_path / "runs").exists()
    assert "parallel.pipeline" in capsys.readouterr().err
