"""What `launch/attempts.sh` asks between attempts: where the run's folder is, whether to try, how it ended, whether to try again.

An attempt makes progress when a newer checkpoint has appeared since it began. Attempts and their ends are lines of `events.jsonl`, so they
are counted across jobs, requeues and batch shells that died. One that named a bad host (`preflight`) is not counted: the next one runs
without that host.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.config_file import RUNS, draft_run
from megarl.errors import ConfigError, MegarlError
from megarl.operations import outcome
from megarl.operations.events import NAME, EventLog, read_events
from megarl.operations.outcome import EXIT_CODES, Outcome

DRAIN = "drain"
BAD_HOSTS_FILE = "bad_nodes"  # written by `preflight`, one name a line; a host whose line is deleted may take part again
STEP = re.compile(r"step-(\d{8,})")
BEGUN, FENCED, BAD_HOSTS = "begun", "fenced", "bad-hosts"


def locate(kind: str, config: Path, overrides: Sequence[str]) -> Path:
    """The folder of a run, made when missing. Raises `ConfigError` with everything wrong in the file."""
    draft = draft_run(kind, config, overrides)
    if draft.faults:
        raise ConfigError([draft.located(fault) for fault in draft.faults])
    run = Path(draft.run.output_dir).resolve()
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: {run} cannot be made: {error.strerror}; expected a directory of yours") from None
    return run


def begin(run: Path, epoch: str) -> str:
    """The attempt `epoch` takes charge of the folder; `fenced`, and nothing done, when its job has been started again since.

    Where somebody had asked the attempt before to stop, its line says so: that one may have been ended before it could. The wish still
    holds for an attempt of the same start, and not for a later one.
    """
    before = outcome.current(run)
    if is_earlier_start(epoch, before):
        return FENCED
    asked = before if (run / DRAIN).exists() else ""
    outcome.make_current(run, epoch)
    if before.rpartition("-")[0] != epoch.rpartition("-")[0]:
        (run / DRAIN).unlink(missing_ok=True)
    EventLog(run / NAME, attempt=epoch).write("attempt", checkpoint=newest_checkpoint(run), bad_hosts=bad_hosts(run), asked=asked)
    return BEGUN


def is_earlier_start(epoch: str, other: str) -> bool:
    """Whether `epoch` is of an earlier start of the job that `other` is of: job-restart-attempt."""
    (job, restart, _), (other_job, other_restart, _) = (
        name.rsplit("-", 2) if name.count("-") >= 2 else (name, "0", "0") for name in (epoch, other)
    )
    return job == other_job and restart.isdigit() and other_restart.isdigit() and int(restart) < int(other_restart)


def end(run: Path, epoch: str, exit_code: int, limit: int) -> str:
    """How the attempt ended, as one word: an outcome, `fenced` when a newer attempt is in charge, `bad-hosts` when it has found some.

    `retry` becomes `no-progress` when so many attempts (`limit`) in a row have published no checkpoint. Ranks that have saved and stopped
    where nobody had asked for it, since a launcher was lost and Slurm sends SIGTERM to those that are left, are a `retry`.
    """
    if not outcome.is_current(run, epoch):
        return FENCED
    os.listdir(run)  # network file systems look again when a directory is read: a rank of another host may have written
    found = outcome.read(run)
    if found is None or found.epoch != epoch:
        found = Outcome("retry", epoch, newest_checkpoint(run), f"the ranks ended with exit code {exit_code} and left no word")
    if found.outcome == "drained" and exit_code != EXIT_CODES["drained"] and not (run / DRAIN).exists():
        found = Outcome("retry", epoch, found.iteration, f"a launcher was lost (exit code {exit_code}); {found.reason}")
    log, events = EventLog(run / NAME, attempt=epoch), read_events(run)
    known = next((event["bad_hosts"] for event in events if event["event"] == "attempt" and event["attempt"] == epoch), [])
    if found.outcome == "retry" and (new := sorted({*bad_hosts(run)} - {*known})):
        found.write(run)
        log.write("outcome", outcome="retry", reason=found.reason, exit_code=exit_code, bad_hosts=new)
        return BAD_HOSTS
    if found.outcome == "retry" and (fruitless := num_fruitless(events, newest_checkpoint(run))) >= limit:
        reason = f"{fruitless} attempts in a row without a new checkpoint; the last one: {found.reason}"
        found = Outcome("no-progress", epoch, found.iteration, reason, found.rank, found.phase)
    found.write(run)
    log.write("outcome", outcome=found.outcome, reason=found.reason, exit_code=exit_code)
    return found.outcome


def num_fruitless(events: Sequence[dict[str, Any]], newest: int) -> int:
    """How many attempts since the run last stopped for good have begun at the checkpoint `newest`.

    Those that were asked to stop, or found a bad host, do not count.
    """
    begun: dict[str, int] = {}
    for event in events:
        if event["event"] == "attempt":
            begun.pop(event.get("asked", ""), None)
            begun[event["attempt"]] = event["checkpoint"]
        elif event["event"] == "outcome" and event["outcome"] == "no-progress":
            begun = {}
        elif event["event"] == "outcome" and (event["outcome"] == "drained" or event.get("bad_hosts")):
            begun.pop(event["attempt"], None)
    return sum(checkpoint == newest for checkpoint in begun.values())


def bad_hosts(run: Path) -> list[str]:
    """Hosts that `preflight` has found unable to take part in the run, and nobody has taken off the list."""
    try:
        return (run / BAD_HOSTS_FILE).read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []


def newest_checkpoint(run: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    found = [STEP.fullmatch(path.name) for path in (run / "checkpoints").glob("step-*")]
    return max((int(match[1]) for match in found if match), default=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """One question of the shell; the answer is on stdout."""
    parser = argparse.ArgumentParser(prog="megarl.operations.attempts")
    commands = parser.add_subparsers(dest="command", required=True)
    where = commands.add_parser("locate")
    where.add_argument("kind", choices=RUNS)
    where.add_argument("config", type=Path)
    where.add_argument("overrides", nargs="*")
    for name in ("begin", "end"):
        command = commands.add_parser(name)
        command.add_argument("run", type=Path)
        command.add_argument("epoch")
        if name == "end":
            command.add_argument("exit_code", type=int)
            command.add_argument("limit", type=int)
    parsed = parser.parse_args(arguments)
    try:
        if parsed.command == "locate":
            print(locate(parsed.kind, parsed.config, parsed.overrides))
        elif parsed.command == "begin":
            print(begin(parsed.run, parsed.epoch))
        else:
            print(end(parsed.run, parsed.epoch, parsed.exit_code, parsed.limit))
    except MegarlError as error:
        for line in str(error).splitlines():
            print(f"megarl: error: {line}", file=sys.stderr)
        return EXIT_CODES[outcome.kind_of(error)]
    except OSError as error:
        print(f"megarl: error: {error.filename} cannot be read or written: {error.strerror}; the run goes on when it can", file=sys.stderr)
        return EXIT_CODES["retry"]
    return 0


if __name__ == "__main__":
    sys.exit(main())
