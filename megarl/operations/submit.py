"""`megarl submit`: sbatch, with the mistakes found before the queue instead of after it.

It checks the run, makes its folder and that of its logs, writes down the resolved configuration and the commit, and lets the job run that
configuration: what is edited while the job waits does not change it. Nodes that an earlier start of the run has found bad are left out. The
job's script stays an ordinary one, which sbatch takes as well.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megarl.check import Inspection, inspect
from megarl.config_file import to_yaml
from megarl.cross_check import started_on
from megarl.errors import ConfigError, SetupError
from megarl.operations.attempts import BAD_HOSTS_FILE, bad_hosts
from megarl.run_folder import versions

SUMMARY = "check a run, freeze its configuration and submit its Slurm script"
SCRIPTS = Path("slurm")
_STAGE = re.compile(r"^STAGE=(\w+)$", re.MULTILINE)
_CONFIG = re.compile(r"^CONFIG=\$\{CONFIG:-(\S+)\}$", re.MULTILINE)
_NAME = re.compile(r"^#SBATCH --job-name=(\S+)$", re.MULTILINE)
_NODES = re.compile(r"^#SBATCH --nodes=(\d+)\s*$", re.MULTILINE)
_RANKS = re.compile(r"^export NPROC=\$\{NPROC:-(\d+)\}", re.MULTILINE)


@dataclass(frozen=True)
class Request:
    """What the command line asks for. `stage` and `config` are empty where the script is not one that trains."""

    script: Path
    stage: str
    config: Path | None
    options: tuple[str, ...]  # of sbatch
    overrides: tuple[str, ...]  # a.b=c, or the arguments of a script without a stage


def add_submit(command: argparse.ArgumentParser) -> None:
    """The arguments of `megarl submit`."""
    command.usage = "megarl submit SCRIPT|CONFIG [--config=FILE] [options of sbatch] [a.b=c ...]"
    command.add_argument("target", metavar="SCRIPT|CONFIG", help="a script of slurm/, or the CONFIG.yaml of the script with its name")
    command.add_argument("--config", type=Path, metavar="FILE", help="a run for SCRIPT other than its own")
    command.add_argument(
        "words", metavar="...", nargs=argparse.REMAINDER, help="options of sbatch as in --time=1:00:00, and a.b=c as for megarl ppo"
    )


def run_submit(parsed: argparse.Namespace) -> int:
    """Submit it, and say where it runs."""
    request = read_request(parsed.target, parsed.config, parsed.words)
    is_parsable = "--parsable" in request.options
    environment, output = dict(os.environ), Path("runs")
    if request.stage:
        frozen, output = freeze(request)
        environment["CONFIG"] = str(frozen)
    logs = output / "logs"
    _make(logs)
    job = sbatch(request, logs, environment, [*left_out(request, output), *exported(request, environment)])
    if is_parsable:
        print(job)
        return 0
    name = option(request.options, "--job-name", "-J") or (_NAME.findall(request.script.read_text()) or [request.script.stem])[0]
    log = option(request.options, "--output", "-o") or f"{logs / name}-{job}.log"
    print(
        f"job {job}: {request.script}" + (f" with {request.config}, checked and frozen in {environment['CONFIG']}" if request.stage else "")
    )
    print(f"  follow it                     tail -F {log}")
    print(f"  its place in the queue        squeue -j {job}")
    if request.stage:
        print(f"  how it ended                  cat {output / 'outcome.json'}")
        print(f"  checkpoint and requeue now    scancel --batch --signal=USR1 {job}")
    print(f"  end it                        scancel {job}")
    return 0


def read_request(target: str, config: Path | None, words: Sequence[str]) -> Request:
    """The request. Raises `ConfigError` for a script that is none, or a configuration without a script of its name."""
    path, (named, words) = Path(target), _take_config(words)
    config = config or named
    if path.suffix in (".yaml", ".yml"):
        if config is not None:
            raise ConfigError(f"found the configurations {path} and {config}; expected one of them, and a script with --config")
        path, config = SCRIPTS / f"{path.stem}.sh", path
        if not path.exists():
            raise ConfigError(f"there is no {path} for {config}: name a script, as in megarl submit slurm/ppo_70b.sh --config={config}")
    if not path.is_file():
        raise ConfigError(f"there is no script {path}; expected one such as slurm/ppo_70b.sh, from the repository's root")
    options, rest, text = [], [], path.read_text(encoding="utf-8")
    for word in words:
        is_value = bool(options) and not rest and re.fullmatch(r"-\w|--[\w-]+", options[-1]) is not None and "=" not in word
        is_value = is_value and options[-1] not in ("--parsable", "--exclusive", "--requeue", "--no-requeue", "--test-only", "--hold")
        (options if word.startswith("-") or is_value else rest).append(word)
    stages, configs = _STAGE.findall(text), _CONFIG.findall(text)
    if not stages:
        return Request(path, "", None, tuple(options), tuple(rest))
    chosen = config or next((Path(name) for name in (os.environ.get("CONFIG", ""), *configs) if name), None)
    if chosen is None:
        raise ConfigError(f"{path} names no configuration (CONFIG=${{CONFIG:-FILE}}): pass one with --config=FILE")
    return Request(path, stages[0], chosen, tuple(options), tuple(rest))


def _take_config(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """What --config says after the script, and the other words. Raises `ConfigError` where it says nothing."""
    value, rest, left = "", [], iter(words)
    for word in left:
        if word != "--config" and not word.startswith("--config="):
            rest.append(word)
            continue
        value = word.partition("=")[2] or next(left, "")
        if not value or value.startswith("-"):
            raise ConfigError("--config has no value; expected --config=FILE")
    return (Path(value) if value else None), rest


def freeze(request: Request) -> tuple[Path, Path]:
    """Check the run and write it down below its folder; returns the frozen file and the folder.

    Raises `ConfigError` with everything wrong.
    """
    inspection = inspect_as_job(request)
    for notice in inspection.notices:
        print(f"megarl: warning: {notice}", file=sys.stderr)
    output = Path(inspection.run.output_dir)
    folder = output / "submitted" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    _make(folder)
    said = {"commit": commit(), "command": sys.argv, "script": str(request.script), "config": str(request.config), "versions": versions()}
    (folder / "config.yaml").write_text(to_yaml(inspection.run), encoding="utf-8")
    (folder / "submitted.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    (folder / request.script.name).write_text(request.script.read_text(encoding="utf-8"), encoding="utf-8")
    return folder / "config.yaml", output


def inspect_as_job(request: Request) -> Inspection:
    """The run on the ranks its job will have, where options and script say how many. Raises `ConfigError`."""
    script = request.script.read_text(encoding="utf-8")
    nodes = option(request.options, "--nodes", "-N") or next(iter(_NODES.findall(script)), "")
    ranks = os.environ.get("NPROC") or next(iter(_RANKS.findall(script)), "")
    if not (nodes.isdigit() and ranks.isdigit()):
        return inspect(request.stage, request.config, request.overrides)
    world = int(nodes) * int(ranks)
    try:
        inspection = inspect(request.stage, request.config, request.overrides, world)
        faults = [fault.text for fault in started_on(inspection.run, world)]
    except ConfigError as error:
        inspect(request.stage, request.config, request.overrides)  # what is wrong on any number of ranks
        faults = error.faults
    if faults:
        raise ConfigError([*faults, f"{request.script} starts {world} ranks: {nodes} nodes (--nodes) with {ranks} each (NPROC)"])
    return inspection


def option(options: Sequence[str], name: str, letter: str) -> str:
    """The value of the last option of that name, in any of its four forms; empty without one."""
    found = ""
    for word, following in zip(options, [*options[1:], ""]):
        if word in (name, letter):
            found = following
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
        elif word.startswith(letter) and not word.startswith("--"):
            found = word[len(letter) :]
    return found


def exported(request: Request, environment: Mapping[str, str]) -> list[str]:
    """sbatch's option by which the job hears of its frozen configuration where the user, or the site, does not pass the environment on."""
    wish = option(request.options, "--export", "--export") or environment.get("SBATCH_EXPORT", "")
    if not request.stage or not wish or "ALL" in wish.split(","):
        return []
    kept = [] if wish in ("NONE", "NIL") else [wish]
    return [f"--export={','.join([*kept, 'CONFIG=' + environment['CONFIG']])}", *(["--get-user-env"] if wish == "NONE" else [])]


def commit() -> str:
    """The commit of the repository here, `+changes` where files differ from it; `unknown` outside of one."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed.strip() else "")


def left_out(request: Request, output: Path) -> list[str]:
    """sbatch's option that keeps the job off the nodes the run has found bad; none where the user names nodes to leave out."""
    bad = bad_hosts(output) if request.stage else []
    if not bad:
        return []
    is_named = any(word.startswith(("--exclude", "-x")) for word in request.options)
    said = "are not left out, because --exclude names others" if is_named else "are left out"
    print(
        f"megarl: warning: {', '.join(bad)} {said}: {output / BAD_HOSTS_FILE} (delete the line of a node that works again)", file=sys.stderr
    )
    return [] if is_named else [f"--exclude={','.join(bad)}"]


def sbatch(request: Request, logs: Path, environment: dict[str, str], more: Sequence[str] = ()) -> str:
    """Hand the script to Slurm, with `more` options; the job's number. Raises `SetupError` with what sbatch says."""
    log = [] if any(word.startswith(("--output", "-o")) for word in request.options) else [f"--output={logs}/%x-%j.log"]
    arguments = () if request.stage else request.overrides  # the frozen configuration holds them
    options = [word for word in request.options if word != "--parsable"]
    command = ["sbatch", "--parsable", *log, *options, *more, str(request.script), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise SetupError("there is no sbatch here: submit from a node that has Slurm's commands") from None
    if done.returncode != 0:
        raise SetupError(f"{shlex.join(command)}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{folder} cannot be made: {error.strerror}; expected a directory of yours") from None
