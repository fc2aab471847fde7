"""Attempts without a cluster: when a run starts again, when it stops for good, and what Slurm is told by attempts.sh and megarl submit."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megarl import cli
from megarl.errors import ConfigError, SetupError
from megarl.operations import attempts, outcome
from megarl.operations.events import read_events
from megarl.operations.outcome import Outcome
from megarl.operations.submit import Request, exported, inspect_as_job, left_out, read_request, sbatch
from tests.unit import tiny_run

ROOT = Path(__file__).parents[2]


def failed(run: Path, epoch: str, limit: int = 2) -> str:
    """One attempt whose ranks are killed before they can say anything."""
    assert attempts.begin(run, epoch) == attempts.BEGUN
    return attempts.end(run, epoch, 137, limit)


def publish(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


# ---------------------------------------------------------------- when to try again
def test_attempts_in_a_row_without_a_new_checkpoint_stop_a_run_for_good(tmp_path):
    assert failed(tmp_path, "7-0-1") == "retry"
    publish(tmp_path, 2)
    assert failed(tmp_path, "7-0-2") == "retry", "there is a newer checkpoint than the first attempt had"
    assert failed(tmp_path, "7-1-1") == "no-progress", "counted across starts of the job"
    found = outcome.read(tmp_path)
    assert found.exit_code == 93 and "2 attempts in a row without a new checkpoint" in found.reason and "137" in found.reason
    assert failed(tmp_path, "8-0-1") == "retry", "somebody has submitted it again: counted anew"


def test_attempts_that_were_asked_to_stop_are_not_counted(tmp_path):
    for number in range(1, 4):  # killed by a pre-emption before they could save
        assert attempts.begin(tmp_path, f"7-{number}-1") == attempts.BEGUN
        (tmp_path / "drain").write_text("SIGTERM\n")
    assert failed(tmp_path, "7-4-1") == "retry" and not (tmp_path / "drain").exists()
    assert failed(tmp_path, "7-4-2") == "no-progress"


@pytest.mark.parametrize(("asked", "code", "word"), [(False, 75, "drained"), (True, 143, "drained"), (False, 143, "retry")])
def test_ranks_that_stop_since_a_launcher_was_lost_start_again_in_the_same_job(tmp_path, asked, code, word):
    """Slurm ends what is left of the step by SIGTERM, at which ranks save and stop: the job keeps its nodes."""
    attempts.begin(tmp_path, "7-0-1")
    if asked:
        (tmp_path / "drain").write_text("SIGTERM\n")
    Outcome("drained", "7-0-1", 12, "a rank was asked to stop: stopped after 12 of 20 steps").write(tmp_path)
    assert attempts.end(tmp_path, "7-0-1", code, 3) == word and outcome.read(tmp_path).outcome == word
    assert ("a launcher was lost (exit code 143)" in outcome.read(tmp_path).reason) == (word == "retry")


def test_a_wish_to_stop_outlives_an_attempt_and_not_a_start(tmp_path):
    attempts.begin(tmp_path, "7-0-1")
    (tmp_path / "drain").touch()  # by a user, while the attempt was failing by itself
    assert attempts.end(tmp_path, "7-0-1", 1, 3) == "retry"
    assert attempts.begin(tmp_path, "7-0-2") == attempts.BEGUN and (tmp_path / "drain").exists()
    assert attempts.begin(tmp_path, "7-1-1") == attempts.BEGUN and not (tmp_path / "drain").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(outcome, "replace_text", refuse)
    assert attempts.main(["begin", str(tmp_path), "7-0-1"]) == 75
    expected = f"megarl: error: {tmp_path}/.attempt cannot be read or written: No space left on device; the run goes on when it can\n"
    assert capsys.readouterr().err == expected


def test_of_ranks_that_fail_together_one_is_heard_whatever_a_host_sees(tmp_path, monkeypatch):
    """A network file system may go on telling a host that there is no outcome yet, long after a rank of another host has written one."""
    attempts.begin(tmp_path, "7-0-1")
    monkeypatch.setenv("MEGARL_ATTEMPT", "7-0-1")
    with pytest.raises(ValueError), outcome.recorded(tmp_path):
        raise ValueError("the cause")
    with monkeypatch.context() as blind:
        blind.setattr(outcome, "read", lambda run: None)
        with pytest.raises(ValueError), outcome.recorded(tmp_path):
            raise ValueError("what it led to")
    assert outcome.read(tmp_path).reason == "ValueError: the cause"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".attempt", "events.jsonl", "outcome.json"]


def test_nobody_leaves_before_the_end_is_written_down(tmp_path, monkeypatch):
    """srun ends the whole step as soon as a node's ranks have left with a code: the word of rank 0 must be on disk by then."""
    config, written = tiny_run.write_run(tmp_path, tiny_run.SFT), []
    run = tmp_path / "runs" / "sft"
    monkeypatch.setattr(cli, "_start", lambda inspection: run.mkdir(parents=True, exist_ok=True))
    monkeypatch.setitem(cli._START, "sft", lambda run, layout: SimpleNamespace(step=1))
    monkeypatch.setattr(cli, "_finish_together", lambda layout: written.append((run / "outcome.json").exists()))
    assert cli.run(["sft", str(config)]) == 75 and written == [False, True]


def test_an_attempt_that_found_a_bad_host_is_not_counted(tmp_path):
    for number, name in enumerate(("n1", "n2", "n3"), 1):
        assert attempts.begin(tmp_path, f"7-{number}-1") == attempts.BEGUN
        Outcome("retry", f"7-{number}-1", reason=f"SetupError: {name}").write(tmp_path)
        with (tmp_path / "bad_nodes").open("a") as file:
            file.write(f"{name}\n")
        assert attempts.end(tmp_path, f"7-{number}-1", 1, 2) == attempts.BAD_HOSTS
    assert outcome.read(tmp_path).reason == "SetupError: n3"
    assert [event["bad_hosts"] for event in read_events(tmp_path) if event["event"] == "outcome"] == [["n1"], ["n2"], ["n3"]]
    assert [failed(tmp_path, f"7-4-{number}") for number in (1, 2)] == ["retry", "no-progress"], "hosts known before are no news"


def test_an_earlier_start_of_the_same_job_does_not_take_over(tmp_path):
    attempts.begin(tmp_path, "7-2-1")
    assert attempts.begin(tmp_path, "7-1-4") == attempts.FENCED and outcome.current(tmp_path) == "7-2-1"
    assert attempts.end(tmp_path, "7-1-3", 1, 3) == attempts.FENCED
    assert attempts.begin(tmp_path, "7-10-1") == attempts.BEGUN and attempts.begin(tmp_path, "6-0-1") == attempts.BEGUN
    assert attempts.begin(tmp_path, "1700000000-55-0-1") == attempts.BEGUN


def test_an_outcome_that_cannot_be_read_is_none(tmp_path):
    for text in ("", "{", "[]", '{"outcome": "fine", "epoch": "1"}', '{"outcome": "done"}'):
        (tmp_path / "outcome.json").write_text(text)
        assert outcome.read(tmp_path) is None
    attempts.begin(tmp_path, "1-0-1")
    assert not Outcome("done", "1-0-0").write(tmp_path) and outcome.read(tmp_path) is None


# ---------------------------------------------------------------- what Slurm is told
COMMANDS = {
    "scontrol": 'case "$1 $2" in "show job") echo "JobId=7 $FAKE_JOB ExcNodeList=${FAKE_OUT:-(null)}" ;;'
    ' "show hostnames") tr , "\\n" <<<"$3" ;; *) echo "scontrol $*" >>"$FAKE_SAID"; eval "${FAKE_REQUEUE:-}" ;; esac',
    "squeue": 'case "$*" in *%e*) eval "${FAKE_BUSY:-}"; date -d "+${FAKE_LEFT:-3 hours}" "+7 %FT%T" ;;'
    ' *PENDING*) echo "8 afterok:7(unfulfilled)" ;; esac',
    "scancel": 'echo "scancel $*" >>"$FAKE_SAID"',
    "sinfo": "printf 'n1\\nn2\\nn3\\nn4\\n'",
    "srun": 'case "$*" in *" true") exit 0 ;; esac; echo "srun $* at $MASTER_ADDR:$MASTER_PORT" >>"$FAKE_SAID"; eval "$FAKE_RANKS"',
    "sleep": "exec /bin/sleep 0.1",
    "sbatch": 'echo "sbatch $*" >>"$FAKE_SAID"; [[ -z ${FAKE_REFUSAL:-} ]] || { echo "$FAKE_REFUSAL" >&2; exit 1; }; echo "41;cluster"',
}
SAY = 'echo "{\\"outcome\\": \\"%s\\", \\"epoch\\": \\"$MEGARL_ATTEMPT\\", \\"reason\\": \\"x\\"}" >"$MEGARL_RUN/outcome.json"; exit %d'
RUNNING = "JobState=RUNNING Reason=None Restarts=0"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands as they are seen from a job of three nodes: they write down what they are told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "said").touch()
    for name, value in {"PATH": f"{folder}:{os.environ['PATH']}", "FAKE_SAID": str(tmp_path / "said"), "FAKE_JOB": RUNNING}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run_job(root: Path, ranks: str, **environment: str) -> tuple[int, list[str], str]:
    """launch/attempts.sh as a job; (exit code, what Slurm was told, what it said)."""
    config = tiny_run.write_run(root, tiny_run.SFT)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_PARTITION": "main", "SLURM_JOB_NODELIST": "n1,n2,n4"}
    job["MEGARL_MAX_FRUITLESS"] = "1"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEGARL_", "SLURM_"))}
    done = subprocess.run(
        ["bash", "launch/attempts.sh", "sft", str(config)],
        cwd=ROOT,
        env=kept | job | {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable, "FAKE_RANKS": ranks} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = (root / "said").read_text().splitlines()
    assert said and said[0].startswith("srun --export=ALL --nodes=3 --ntasks=3 --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 "), (
        done.stderr
    )
    assert re.search(r" at n1:2\d{4}$", said[0]), "no rank could find the others without Slurm's commands, as in a container"
    return done.returncode, said[1:], done.stderr


@pytest.mark.parametrize(("kind", "code"), [("done", 0), ("config-error", 78)])
def test_what_is_done_or_a_users_mistake_is_not_tried_again(slurm, kind, code):
    assert run_job(slurm, SAY % (kind, code))[:2] == (code, [])


def test_drained_goes_back_into_the_queue_without_the_bad_nodes(slurm):
    ranks = 'printf "n3\\nlaptop\\n" >"$MEGARL_RUN/bad_nodes"; ' + SAY % ("drained", 75)
    code, said, text = run_job(slurm, ranks, FAKE_OUT="n8,n9")
    assert (code, said) == (75, ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n3,n8,n9"]), "once the job is pending"
    assert "job 7 leaves out n3,n8,n9 from now on" in text


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0", ["scontrol requeue 7"]),
        ("JobState=COMPLETING Reason=None Restarts=1", []),  # `scontrol requeue` from outside
        ("JobState=COMPLETING Reason=None Restarts=0", []),  # scancel
    ],
)
def test_a_job_that_slurm_is_ending_is_left_to_it(slurm, state, told):
    assert run_job(slurm, SAY % ("drained", 75), FAKE_JOB=state)[:2] == (75, told)


def test_bad_nodes_end_the_job_where_too_few_remain(slurm):
    ranks = 'printf "n3\\nn4\\n" >"$MEGARL_RUN/bad_nodes"; ' + SAY % ("retry", 1)
    code, said, text = run_job(slurm, ranks)
    assert (code, said) == (75, []) and "needs 3 nodes and main has too few besides n3,n4" in text


def test_a_controller_that_is_busy_is_asked_again(slurm):
    late = '[[ $(grep -c requeue "$FAKE_SAID") == 3 ]] || { echo "Unable to contact slurm controller" >&2; exit 1; }'
    code, said, text = run_job(slurm, SAY % ("drained", 75), FAKE_REQUEUE=late)
    assert (code, said) == (75, ["scontrol requeue 7"] * 3) and "goes back into the queue" in text


def test_a_job_that_may_not_be_requeued_is_not_asked_for_again(slurm):
    code, said, text = run_job(slurm, SAY % ("drained", 75), FAKE_JOB=f"Requeue=0 {RUNNING}", FAKE_REQUEUE="exit 1")
    assert (code, said) == (75, ["scontrol requeue 7"]) and "submit it again" in text


def test_the_time_limit_is_seen_by_a_job_whose_controller_did_not_answer_at_first(slurm):
    busy = 'echo >>"$FAKE_SAID.asked"; (($(wc -l <"$FAKE_SAID.asked") > 3)) || exit 1'
    ranks = "for i in {1..200}; do [[ ! -s $MEGARL_DRAIN ]] || break; sleep; done; [[ -s $MEGARL_DRAIN ]] || exit 1; "
    code, said, text = run_job(slurm, ranks + SAY % ("drained", 75), FAKE_LEFT="5 minutes", FAKE_BUSY=busy)
    assert (code, said) == (75, ["scontrol requeue 7"]) and "the time limit comes near: the ranks stop after this step" in text


def test_in_a_container_ranks_find_one_another_without_slurms_commands(slurm):
    inside = slurm / "bin" / "apptainer"
    inside.write_text('#!/usr/bin/env bash\nuntil [[ $1 == *.sif ]]; do shift; done\nshift\nPATH=/usr/bin:/bin exec "$@"\n')
    python = slurm / "python3"
    python.write_text(
        f'#!/usr/bin/env bash\n[[ $* == *megarl.launcher* ]] || exec {sys.executable} "$@"\necho "$*" >>"$FAKE_SAID"\n'
        + SAY % ("done", 0)
        + "\n"
    )
    for path in (inside, python):
        path.chmod(0o755)
    ranks = 'while [[ $1 == --* ]]; do shift; done; SLURM_STEP_NUM_NODES=3 SLURM_NODEID=0 "$@"'
    code, said, text = run_job(slurm, ranks, MEGARL_CONTAINER=str(slurm / "megarl.sif"), MEGARL_PYTHON=str(python))
    assert code == 0 and re.search(r"--nnodes 3 .*--rdzv-endpoint n1:2\d{4} .*is_host=1.* --module megarl sft", said[0]), text


@pytest.mark.parametrize(("name", "value"), [("MEGARL_MAX_FRUITLESS", "none"), ("MEGARL_LEAD_S", "15m"), ("MEGARL_NODES_WAIT_S", "0")])
def test_settings_that_are_no_numbers_are_one_line(slurm, name, value):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEGARL_", "SLURM_"))}
    environment = kept | {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable, name: value}
    done = subprocess.run(["bash", "launch/attempts.sh", "sft", "x.yaml"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"megarl: {name} is '{value}'; expected a whole number over 0\n"


def test_no_progress_cancels_the_jobs_that_wait(slurm):
    assert run_job(slurm, SAY % ("retry", 1))[:2] == (93, ["scancel 8"])


RANK = """
import os, sys, time
from pathlib import Path
from megarl.operations import drain, outcome
drain.listen()
run = Path(os.environ["MEGARL_RUN"])
(run / "ready").touch()
for _ in range(300):
    time.sleep(0.1)
    if why := drain.reason(0):
        ended = outcome.ended(3, 8, why)
        ended.write(run)
        sys.exit(ended.exit_code)
"""


def test_ctrl_c_stops_the_ranks_after_their_step(tmp_path):
    """A terminal sends it to the loop, the launcher and the ranks at once."""
    (tmp_path / "rank_program.py").write_text(RANK)
    config, run = tiny_run.write_run(tmp_path, tiny_run.SFT), tmp_path / "runs" / "sft"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEGARL_", "SLURM_"))}
    settings = {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable, "MEGARL_MODULE": "rank_program", "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        ["bash", "launch/attempts.sh", "sft", str(config)],
        cwd=ROOT,
        env=kept | settings | {"NPROC": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as loop:
        deadline = time.monotonic() + 60
        while not (run / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(loop.pid, signal.SIGINT)
        _, text = loop.communicate(timeout=60)
    assert (loop.returncode, outcome.read(run).reason) == (75, "interrupted: stopped after 3 of 8 steps"), text
    assert "Traceback" not in text


# ---------------------------------------------------------------- megarl submit
def test_options_of_sbatch_are_told_from_keys(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CONFIG", raising=False)
    words = ["--time=1:00", "-N", "4", "--account", "us", "--exclusive", "ppo.total_steps=3", "seed=2"]
    found = read_request("slurm/ppo_70b.sh", None, words)
    assert found.options == ("--time=1:00", "-N", "4", "--account", "us", "--exclusive")
    assert found.overrides == ("ppo.total_steps=3", "seed=2") and found.config == Path("configs/ppo_70b.yaml") and found.stage == "ppo"
    assert read_request("configs/sft_70b.yaml", None, []).script == Path("slurm/sft_70b.sh")
    export = read_request("slurm/export_70b.sh", None, ["--time=5", "runs/a", "out"])
    assert (export.stage, export.options, export.overrides) == ("", ("--time=5",), ("runs/a", "out"))
    for words in (["--config=a.yaml", "--time=5"], ["--config", "a.yaml", "--time=5"]):
        found = read_request("slurm/sft_70b.sh", None, words)
        assert (found.config, found.options, found.overrides) == (Path("a.yaml"), ("--time=5",), ())
    for target, words in (
        ("slurm/none.sh", []),
        ("configs/sft_70b.yaml", ["--config=other.yaml"]),
        ("slurm/sft_70b.sh", ["--config"]),
        ("slurm/sft_70b.sh", ["--config", "--time=5"]),
    ):
        with pytest.raises(ConfigError):
            read_request(target, None, words)


def test_what_sbatch_is_told(slurm, capsys):
    script, run = ROOT / "slurm/sft_70b.sh", slurm / "run"
    run.mkdir()
    request = Request(script, "sft", None, ("--parsable", "--time=5"), ("seed=1",))
    assert left_out(request, run) == []
    (run / "bad_nodes").write_text("n2\nn5\n")
    assert left_out(request, run) == ["--exclude=n2,n5"] and "n2, n5 are left out" in capsys.readouterr().err
    assert left_out(Request(script, "sft", None, ("--exclude=n1",), ()), run) == [] and "not left out" in capsys.readouterr().err
    assert sbatch(request, run / "logs", dict(os.environ), left_out(request, run)) == "41"
    expected = f"sbatch --parsable --output={run}/logs/%x-%j.log --time=5 --exclude=n2,n5 {script}"
    assert (slurm / "said").read_text() == expected + "\n", "keys are in the frozen configuration"
    with pytest.raises(SetupError, match="--time=5.*invalid partition"):
        sbatch(request, run / "logs", dict(os.environ) | {"FAKE_REFUSAL": "sbatch: error: invalid partition"})


@pytest.mark.parametrize(
    ("options", "site", "expected"),
    [
        ((), "", []),
        (("--export=ALL,A=1",), "NONE", []),
        (("--export=A=1,PATH",), "", ["--export=A=1,PATH,CONFIG=f.yaml"]),
        (("--export", "NIL"), "", ["--export=CONFIG=f.yaml"]),
        ((), "NONE", ["--export=CONFIG=f.yaml", "--get-user-env"]),
    ],
)
def test_a_job_without_the_environment_hears_of_its_configuration(options, site, expected):
    request = Request(Path("x.sh"), "sft", None, options, ())
    assert exported(request, {"CONFIG": "f.yaml", "SBATCH_EXPORT": site}) == expected


def test_a_job_of_too_many_ranks_is_refused_before_the_queue(tmp_path, monkeypatch):
    config = tiny_run.write_run(tmp_path, tiny_run.SFT)
    script = ROOT / "slurm/sft_70b.sh"

    def ranks(*options: str) -> int:
        return inspect_as_job(Request(script, "sft", config, options, ())).world_size

    monkeypatch.setenv("NPROC", "1")
    assert [ranks("--nodes=2"), ranks("-N", "1"), ranks("-N1"), ranks("--nodes=2", "--nodes", "1")] == [2, 1, 1, 1]
    assert ranks("--nodes=1-2") == 1, "the layout's own size where Slurm may choose"
    monkeypatch.delenv("NPROC")
    with pytest.raises(ConfigError) as refusal:
        ranks("--nodes=3")
    assert refusal.value.faults[-1] == f"{script} starts 24 ranks: 3 nodes (--nodes) with 8 each (NPROC)"
    with pytest.raises(ConfigError, match="8 ranks, but this run was started on 128"):
        keys = ("cluster.nodes=1", "cluster.ranks_per_node=8", "parallel.microbatch_size=1", "train.batch_size=128")
        inspect_as_job(Request(script, "sft", config, (), keys))


def test_where_the_log_is_follows_the_options(slurm, tmp_path, monkeypatch, capsys):
    config = tiny_run.write_run(tmp_path, tiny_run.SFT)
    monkeypatch.setenv("NPROC", "1")
    monkeypatch.chdir(ROOT)
    submit = ["submit", "slurm/sft_70b.sh", f"--config={config}", "--nodes=1"]
    assert cli.run([*submit, "-J", "mine"]) == 0 and cli.run([*submit, "--output=here.log"]) == 0
    followed = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "follow it" in line]
    assert followed == [f"{tmp_path}/runs/sft/logs/mine-41.log", "here.log"]


def test_attempts_ends_are_lines_of_the_diary(tmp_path):
    failed(tmp_path, "7-0-1")
    begun, ended = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (begun["event"], begun["attempt"], begun["checkpoint"]) == ("attempt", "7-0-1", 0)
    assert (ended["event"], ended["outcome"], ended["exit_code"]) == ("outcome", "retry", 137)
