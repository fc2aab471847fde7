"""`megarl plan CONFIG`: whether a run fits its GPUs and how long a step takes, without a GPU."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megarl.config_file import RUNS, draft_run
from megarl.errors import ConfigError
from megarl.planner.devices import DEFAULT_GPU, GPUS, Assumptions

PLAIN_WIDTH = 200  # columns of text that goes to a file
RANKS_PER_NODE = 8  # where the run names no cluster
RATES = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "MBIT": 1e6 / 8, "GBIT": 1e9 / 8}


def add_plan(command: argparse.ArgumentParser) -> None:
    """Arguments of `megarl plan`."""
    command.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the run, such as one in configs/")
    command.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="set a key, as for the run itself")
    command.add_argument("--kind", choices=tuple(RUNS), help="what kind of run CONFIG is [by its name or its keys]")
    command.add_argument("--gpus", type=_positive, metavar="N", help="GPUs [as many as CONFIG's cluster has]")
    command.add_argument("--gpu", type=_gpu, default=DEFAULT_GPU, metavar="KIND", help=f"{', '.join(sorted(GPUS))} [{DEFAULT_GPU}]")
    command.add_argument("--network", type=_rate, metavar="RATE", help="one GPU to other nodes, such as 45GB/s or 400Gbit/s [the usual]")
    command.add_argument("--prompt-tokens", type=_positive, metavar="N", help="tokens of an average prompt [the longest]")
    command.add_argument("--response-tokens", type=_positive, metavar="N", help="tokens of an average response or sequence [the longest]")
    command.add_argument("--search", action="store_true", help="rank other layouts on the same GPUs")
    command.add_argument("--json", action="store_true", help="print all numbers as JSON")
    command.epilog = f"Exit code 0: it fits; {ConfigError.exit_code}: it does not, or CONFIG is wrong."


def run_plan(parsed: argparse.Namespace) -> int:
    """Plan and print."""
    from megarl.check import inspect
    from megarl.planner import report, search
    from megarl.planner.larger import larger_machines
    from megarl.planner.plan import make_plan
    from megarl.planner.step_time import Lengths, Machines, longest_lengths
    from megarl.run_files import model_uses

    kind = parsed.kind or kind_of(parsed.config, parsed.overrides)
    inspection = inspect(kind, parsed.config, parsed.overrides, parsed.gpus)
    run, gpu = inspection.run, GPUS[parsed.gpu]
    unknown = [f"{use.key} ({use.path})" for use in model_uses(run) if use.key not in inspection.specs]
    if not inspection.specs:
        raise ConfigError(
            f"{parsed.config}: the shapes of {', '.join(unknown)} are not known; expected a config.json in a model's directory, or in one"
            f" that its key `shape` names"
        )
    per_node = run.cluster.ranks_per_node if run.cluster is not None else RANKS_PER_NODE
    machines = Machines(gpu, parsed.network or gpu.network_bandwidth, per_node, Assumptions())
    longest = longest_lengths(run)
    lengths = Lengths(parsed.prompt_tokens or longest.prompt, parsed.response_tokens or longest.response)
    if lengths.prompt > longest.prompt or lengths.response > longest.response:
        raise ConfigError(
            f"found an average of {lengths.prompt:g} + {lengths.response:g} tokens; expected at most the longest that the run allows,"
            f" {longest.prompt:g} + {longest.response:g}: lower --prompt-tokens or --response-tokens"
        )
    plan = make_plan(run, inspection.specs, inspection.world_size, machines, lengths)
    changes = search.remedies(plan)
    ways = report.Ways(changes, [] if plan.fits or changes else larger_machines(plan))
    found = search.search(plan) if parsed.search else None
    if parsed.json:
        print(json.dumps(report.as_json(plan, ways, found) | {"left_out": unknown}, indent=1))
    else:
        if unknown:
            print(
                f"warning: left out, as no config.json tells their shapes: {', '.join(unknown)}; a key `shape` may name one",
                file=sys.stderr,
            )
        report.show(plan, ways, found, Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH))
    return 0 if plan.fits else ConfigError.exit_code


def kind_of(path: Path, overrides: Sequence[str] = ()) -> str:
    """The kind of run in a file: the first word of its name, or the only kind that takes its keys."""
    word = re.split(r"[^a-z]", path.stem)[0]
    if word in RUNS:
        return word
    fitting = [kind for kind in RUNS if not draft_run(kind, path, overrides).faults]
    if len(fitting) != 1:
        whose = "several kinds of run" if fitting else "no kind of run"
        raise ConfigError(f"{path}: the keys are those of {whose}; expected --kind {' or '.join(fitting or RUNS)}")
    return fitting[0]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number of at least 1")
    return int(text)


def _gpu(text: str) -> str:
    """The name of a kind of GPU, or its beginning where no other begins so."""
    found = [name for name in GPUS if name.startswith(text.lower())]
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected one of {', '.join(found if text and found else sorted(GPUS))}")
    return found[0]


def _rate(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)(?:/s|ps)?", text.strip())
    if found is None or found[2].upper() not in RATES or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected bytes or bits a second, such as 45GB/s or 400Gbit/s")
    return float(found[1]) * RATES[found[2].upper()]
