"""The command `megarl`. Reading and refusing come first and import nothing heavy; torch, Megatron and vLLM load for a run that fits.

Exit codes: 0 done; 75 stopped because it was asked to, the same command goes on from there; 78 a run that cannot work as it is configured,
65 data that cannot be read, 2 another mistake of the user (one line each on stderr, no traceback); 1 anything else (with its traceback);
130 interrupted. `outcome.json` in the run's folder says the same and more.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from megarl import __version__, data_commands, file_commands
from megarl.check import Inspection, inspect, show
from megarl.config import DpoRun, PpoRun, RewardRun, RrhfRun, Run, SampleRun, SftRun
from megarl.config_file import RUNS
from megarl.errors import ConfigError, MegarlError
from megarl.operations import drain, heartbeat, outcome
from megarl.operations.commands import COMMANDS as OPERATIONS
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.torchrun import is_torchrun, rank_from_environment
from megarl.planner import command as planner
from megarl.rewards.check import patience_s
from megarl.run_folder import describe_versions, private_umask, write_run_folder
from megarl.serving import command as serving

if TYPE_CHECKING:
    from megarl.checkpoint.train_state import TrainState
    from megarl.sampling.sampler import Answered

SAY_AFTER_S = (5.0, 10.0)  # first rank of another node, every other rank: torchrun ends them sooner when rank 0 has spoken
PLAIN_WIDTH = 160  # columns of text that goes to a file
OTHERS = {**file_commands.COMMANDS, **data_commands.COMMANDS, **serving.COMMANDS, **OPERATIONS}  # commands that are no runs

_SUMMARY = {
    "ppo": "PPO with a critic: sample with vLLM, score, learn, publish the weights, repeat",
    "sft": "supervised fine-tuning on demonstrations",
    "reward": "train a reward model on preference pairs",
    "dpo": "direct preference optimisation (or IPO) on preference pairs",
    "rrhf": "learn from ranked lists of responses",
    "sample": "sample responses to prompts, score them and write them down",
    **{name: summary for name, (summary, _, _) in OTHERS.items()},
    "plan": "does a run fit its GPUs, and how long does a step take? Needs no GPU",
    "version": "versions of megarl and of what it runs on",
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code.

    Leaves without waiting for threads of vLLM or of a collective: a rank that fails must not keep the others waiting.
    """
    leave(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code, everything worth saying having been printed."""
    try:
        return _dispatch(list(arguments))
    except SystemExit as end:  # argparse has printed its help or its complaint
        return end.code if isinstance(end.code, int) else MegarlError.exit_code
    except MegarlError as error:
        _say(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("megarl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left; a second complaint would come while Python closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException:
        rank, world_size, _ = rank_from_environment()
        trace = traceback.format_exc()
        print(trace if world_size == 1 else "".join(f"[rank {rank}] {line}\n" for line in trace.splitlines()), file=sys.stderr, end="")
        return 1


def leave(code: int) -> NoReturn:
    """End the process now: output flushed, threads left behind."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


def _say(error: MegarlError) -> None:
    """Print a user's mistake, on as few ranks as possible: rank 0 at once, another one only when torchrun has not ended it meanwhile."""
    rank, world_size, local_rank = rank_from_environment()
    if rank != 0:
        time.sleep(SAY_AFTER_S[0] if local_rank == 0 else SAY_AFTER_S[1])
    who = "megarl: error" if world_size == 1 or rank == 0 else f"megarl: error on rank {rank}"
    faults = error.faults if isinstance(error, ConfigError) else [str(error)]
    for fault in faults:
        print(f"{who}: {' '.join(fault.split())}", file=sys.stderr)


def _dispatch(arguments: list[str]) -> int:
    parser = _parser()
    parsed, extra = parser.parse_known_args(arguments)
    if parsed.command in RUNS or parsed.command == "plan":
        parsed.overrides += extra  # argparse gives up on positional arguments that follow an option
        extra = [word for word in parsed.overrides if word.startswith("-")]
    if extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if parsed.command is None:
        parser.print_help()
        return 0
    return parsed.action(parsed)


# ---------------------------------------------------------------- runs
def _course(parsed: argparse.Namespace) -> int:
    _, world_size, _ = rank_from_environment()
    if "=" in parsed.config and not Path(parsed.config).exists():
        raise ConfigError(f"found {parsed.config!r} where the YAML file should be; expected megarl {parsed.command} CONFIG key=value ...")
    if parsed.check:
        wanted = parsed.world or (world_size if is_torchrun() else None)
        inspection = inspect(parsed.command, Path(parsed.config), parsed.overrides, wanted)
        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        show(inspection, console)
        return 0
    if parsed.world is not None:
        raise ConfigError("--world is for --check; a run has as many ranks as were started")
    with outcome.recorded():
        inspection = inspect(parsed.command, Path(parsed.config), parsed.overrides, world_size, is_start=True)
        run = inspection.run
        patience = patience_s(run) if isinstance(run, PpoRun | SampleRun) else 0.0
        with heartbeat.rank_of(run.output_dir, patience), outcome.recorded(run.output_dir):
            layout = _start(inspection)
            state = _START[parsed.command](run, layout)
            _finish_together(layout)
            code = _conclude(run, state)
            _finish_together(layout)  # srun ends all ranks when one leaves with a code: rank 0 has written by then
    return code


def _conclude(run: Run, state: "TrainState | Answered") -> int:
    """Rank 0 writes down that the run is done, or where it stopped because it was asked to; returns the exit code."""
    if isinstance(run, SampleRun):
        total = state.total
    else:
        total = run.ppo.total_steps if isinstance(run, PpoRun) else run.train.total_steps
    ended = outcome.ended(state.step, total, drain.reason(0))
    if rank_from_environment()[0] == 0:
        ended.write(run.output_dir)
        if ended.outcome == "drained":
            print(f"megarl: {ended.reason}", file=sys.stderr)
    return ended.exit_code


def _start(inspection: Inspection) -> ParallelLayout:
    """Write down what is about to run and start the process groups. What a run writes is for its user alone, and it fetches nothing."""
    os.umask(private_umask(os.environ))
    os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE") or "1"
    drain.listen()
    if rank_from_environment()[0] == 0:
        write_run_folder(inspection.run)
        if outcome.epoch() == outcome.ALONE:
            outcome.make_current(inspection.run.output_dir, outcome.ALONE)
        for notice in inspection.notices:
            print(f"megarl: warning: {notice}", file=sys.stderr)
    from megarl.operations import preflight
    from megarl.parallel import groups

    if preflight.is_wanted():
        preflight.count_gpus(inspection.run.output_dir)
    layout = groups.initialize(inspection.run.parallel, inspection.run.seed)
    if preflight.is_wanted():
        preflight.preflight(inspection.run.output_dir)
    return layout


def _finish_together(layout: ParallelLayout) -> None:
    """Every rank waits until all are done: rank 0 may hold the store that the others still talk to."""
    from megarl.parallel import collectives, groups

    collectives.agree(None, groups.group(layout, "world"))


def _ppo(run: PpoRun, layout: ParallelLayout) -> "TrainState":
    from megarl.ppo.assembly import build_parts
    from megarl.ppo.loop import train

    parts = build_parts(run, layout)
    with closing(parts.log):
        return train(run, layout, parts)


def _sft(run: SftRun, layout: ParallelLayout) -> "TrainState":
    from megarl.course.sft import train_sft

    return train_sft(run, layout)


def _reward(run: RewardRun, layout: ParallelLayout) -> "TrainState":
    from megarl.course.reward_model import train_reward

    return train_reward(run, layout)


def _dpo(run: DpoRun, layout: ParallelLayout) -> "TrainState":
    from megarl.course.dpo import train_dpo

    return train_dpo(run, layout)


def _rrhf(run: RrhfRun, layout: ParallelLayout) -> "TrainState":
    from megarl.course.rrhf import train_rrhf

    return train_rrhf(run, layout)


def _sample(run: SampleRun, layout: ParallelLayout) -> "Answered":
    from megarl.sampling.assembly import sample_responses

    return sample_responses(run, layout)


_START = {"ppo": _ppo, "sft": _sft, "reward": _reward, "dpo": _dpo, "rrhf": _rrhf, "sample": _sample}


def _version(parsed: argparse.Namespace) -> int:
    for name, version in describe_versions().items():
        print(f"{name:20} {version}")
    return 0


# ---------------------------------------------------------------- arguments
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megarl", description="Reinforcement learning from human feedback on Megatron-Core and vLLM.")
    parser.add_argument("--version", action="version", version=f"megarl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for kind in RUNS:
        _add_course(_add(commands, kind, _course))
    for name, (_, add_arguments, action) in OTHERS.items():
        add_arguments(_add(commands, name, action))
    planner.add_plan(_add(commands, "plan", planner.run_plan))
    _add(commands, "version", _version)
    return parser


def _add(commands: argparse._SubParsersAction, name: str, action: Callable[[argparse.Namespace], int] | None) -> argparse.ArgumentParser:
    """A command; `action` is None where its own commands have theirs."""
    command = commands.add_parser(name, help=_SUMMARY[name], description=_SUMMARY[name].capitalize() + ".")
    if action is not None:
        command.set_defaults(action=action)
    return command


def _add_course(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="YAML file of the run, such as one in configs/")
    command.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="set a key by its dotted name, the value read as YAML: parallel.tensor=2 rewards.0.weight=0.5 eval=null",
    )
    command.add_argument("--check", action="store_true", help="say what the run would be and whether it fits, and start nothing")
    command.add_argument(
        "--world", type=file_commands.positive, metavar="N", help="with --check: count with N ranks [as many as CONFIG's cluster has]"
    )
    command.epilog = (
        "A run on several ranks starts with launch/torchrun.sh: NPROC=4 bash launch/torchrun.sh " + command.prog.split()[-1] + " CONFIG"
    )


if __name__ == "__main__":
    main()
