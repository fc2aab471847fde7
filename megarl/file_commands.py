"""Commands about files: `megarl export`, `megarl import`, `megarl checkpoint ...`. Their arguments, and what they print.

Nothing heavy is imported before a command runs.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megarl.errors import CheckpointError, ConfigError
from megarl.parallel.torchrun import rank_from_environment

PLAIN_WIDTH = 200  # columns of text that goes to a file
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SUMMARIES = {
    "list": "what a run's checkpoint directory holds",
    "verify": "read every byte and compare it with the manifest",
    "show": "what one checkpoint holds",
    "diff": "tensors in which two models differ",
    "prune": "remove what the run's retention rules do not keep",
}


def add_export(command: argparse.ArgumentParser) -> None:
    """Arguments of `megarl export`."""
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, or a run's output_dir (its newest checkpoint)")
    command.add_argument("out", metavar="OUT", type=Path, help="directory to write; it must not exist or be empty")
    command.add_argument("--role", choices=("actor", "critic", "reward"), help="model of the checkpoint [actor, else the only one]")
    command.add_argument("--ema", action="store_true", help="the moving average of the weights, of a run with ppo.ema")
    command.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="type of the weights [as stored]")
    command.add_argument("--shard-size", type=size_in_bytes, metavar="SIZE", help="largest safetensors file, such as 500MB or 2GiB [5GB]")
    command.add_argument(
        "--proof",
        choices=("auto", "logits", "elements"),
        default="auto",
        help="compare logits with transformers, too, or elements and names alone [auto: logits of models up to 300M parameters]",
    )
    command.epilog = "Several ranks share the files: NPROC=4 bash launch/torchrun.sh export CHECKPOINT OUT"


def add_import(command: argparse.ArgumentParser) -> None:
    """Arguments of `megarl import`."""
    command.add_argument("source", metavar="DIR", type=Path, help="directory with config.json and *.safetensors")
    command.add_argument("out", metavar="OUT", type=Path, help="directory to write; it must not exist or be empty")
    command.add_argument("--tokenizer", type=Path, metavar="PATH", help="sentencepiece .model file or Hugging Face directory [DIR]")
    command.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="type of the weights [as they are]")
    command.add_argument(
        "--proof",
        choices=("auto", "logits", "elements"),
        default="auto",
        help="compare scores or logits of fixed texts with transformers' [auto: scores of reward models up to 300M parameters]",
    )
    command.add_argument("--from-megatron", action="store_true", help="DIR is a Megatron-LM checkpoint of the format torch_dist")
    command.add_argument("--hf-config", type=Path, metavar="HF_DIR", help="with --from-megatron: config.json and tokenizer of the model")


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """Arguments of `megarl checkpoint`."""
    actions = command.add_subparsers(dest="checkpoint_command", metavar="COMMAND", required=True)
    known = {"list": _list, "verify": _verify, "show": _show, "diff": _diff, "prune": _prune}
    made = {name: actions.add_parser(name, help=SUMMARIES[name], description=SUMMARIES[name].capitalize() + ".") for name in known}
    for name, action in made.items():
        action.set_defaults(action=known[name])
        action.add_argument("--json", action="store_true", help="print JSON")
    made["list"].add_argument("run", metavar="RUN", type=Path, help="a run's output_dir")
    made["verify"].add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, or a run's output_dir (its newest)")
    made["verify"].add_argument("--all", action="store_true", help="every checkpoint of the run")
    made["verify"].add_argument("--threads", type=positive, metavar="N", help="files read at once [the cores, at most 16]")
    made["show"].add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, or a run's output_dir (its newest)")
    for name in ("a", "b"):
        made["diff"].add_argument(name, metavar=name.upper(), type=Path, help="a checkpoint, a run, or a Hugging Face directory")
    made["diff"].add_argument("--role", choices=("actor", "critic", "reward"), help="model of the checkpoints [actor, else the only one]")
    made["diff"].add_argument("--limit", type=positive, default=50, metavar="N", help="differing tensors to print [50]")
    prune = made["prune"]
    prune.add_argument("run", metavar="RUN", type=Path, help="a run's output_dir")
    prune.add_argument("--keep-last", type=positive, metavar="N", help="newest checkpoints to keep [the run's checkpoint.keep_last]")
    prune.add_argument("--keep-every-steps", type=positive, metavar="M", help="keep every M-th step, too [the run's]")
    prune.add_argument("--keep-best", metavar="METRIC", help="keep the one with the highest METRIC, or the lowest of -METRIC [the run's]")
    prune.add_argument("--dry-run", action="store_true", help="remove nothing")


# ---------------------------------------------------------------- conversion
def run_export(parsed: argparse.Namespace) -> int:
    """`megarl export`."""
    from megarl.checkpoint.hf_export import export
    from megarl.checkpoint.streams import MAX_SHARD_BYTES

    what = (parsed.checkpoint, parsed.out, parsed.role, parsed.dtype, parsed.shard_size or MAX_SHARD_BYTES, parsed.proof)
    if rank_from_environment()[1] == 1:
        print(f"exported {parsed.checkpoint} to {export(*what, is_average=parsed.ema)}")
        return 0
    from megarl.config import ParallelConfig
    from megarl.parallel import collectives, groups

    layout = groups.initialize(ParallelConfig(), seed=0)
    out = export(*what, layout, parsed.ema)
    if layout.rank == 0:
        print(f"exported {parsed.checkpoint} to {out} on {layout.world_size} ranks")
    collectives.agree(None, groups.group(layout, "world"))  # rank 0 may hold the store that the others still talk to
    return 0


def run_import(parsed: argparse.Namespace) -> int:
    """`megarl import`."""
    if not parsed.from_megatron:
        if parsed.hf_config is not None:
            raise ConfigError("--hf-config is for --from-megatron: a Hugging Face directory has its own config.json")
        from megarl.checkpoint.hf_import import import_hf

        out = import_hf(parsed.source, parsed.out, parsed.tokenizer, parsed.dtype, parsed.proof)
    else:
        if parsed.hf_config is None:
            raise ConfigError("--from-megatron needs --hf-config HF_DIR: a Megatron-LM checkpoint does not say what the model computes")
        from megarl.checkpoint.megatron_import import import_megatron

        out = import_megatron(parsed.source, parsed.hf_config, parsed.out, parsed.tokenizer, parsed.dtype)
    print(f"imported {parsed.source} to {out}")
    return 0


# ---------------------------------------------------------------- checkpoints
def _list(parsed: argparse.Namespace) -> int:
    from megarl.checkpoint.inspection import list_checkpoints

    listed = list_checkpoints(parsed.run)
    rows = [
        (
            entry.name + (" *" if entry.is_latest else ""),
            entry.written,
            entry.course,
            entry.layout,
            " ".join(entry.models),
            _bytes(entry.num_bytes) if entry.num_bytes else "",
            entry.state or "complete",
        )
        for entry in listed
    ]
    _print(
        parsed,
        [asdict(entry) for entry in listed],
        ("checkpoint (* latest)", "written", "course", "layout", "models", "size", "state"),
        rows,
    )
    return 0


def _verify(parsed: argparse.Namespace) -> int:
    from megarl.checkpoint import manifest as manifests
    from megarl.checkpoint.inspection import verify_checkpoint

    newest = manifests.find_checkpoint(parsed.checkpoint)
    if newest is None:
        raise CheckpointError(f"{parsed.checkpoint} is no checkpoint and holds no finished one (checkpoints/step-*)")
    directories = manifests.step_directories(newest.parent) if parsed.all else [newest]
    threads = parsed.threads or min(16, os.cpu_count() or 1)
    verified = [verify_checkpoint(directory, threads) for directory in directories]
    told = [asdict(one) | {"directory": str(one.directory)} for one in verified]
    rows = [(one.directory.name, found.file, found.expected, found.found) for one in verified for found in one.findings]
    if rows or parsed.json:
        _print(parsed, told, ("checkpoint", "file", "expected", "found"), rows)
    for one in verified:
        if not parsed.json and not one.findings:
            speed = f"{one.num_bytes / max(one.seconds, 1e-9) / 1e9:.2f} GB/s, {threads} threads"
            print(f"{one.directory}: {one.num_files} files, {_bytes(one.num_bytes)}: every byte is what was written ({speed})")
    if damaged := [one.directory.name for one in verified if one.findings]:
        raise CheckpointError(f"{', '.join(damaged)}: not what was written ({len(rows)} findings)")
    return 0


def _show(parsed: argparse.Namespace) -> int:
    from megarl.checkpoint import manifest as manifests
    from megarl.checkpoint.inspection import describe

    found = manifests.find_checkpoint(parsed.checkpoint)
    if found is None:
        raise CheckpointError(f"{parsed.checkpoint} is no checkpoint and holds no finished one (checkpoints/step-*)")
    facts = describe(found)
    rows = [(name, _sentence(value)) for name, value in facts.items() if not isinstance(value, dict)]
    for name in ("state", "metrics", "models", "files", "versions"):
        rows += [(f"{name}: {key}", _sentence(value)) for key, value in facts.get(name, {}).items()]
    _print(parsed, facts, ("fact", "value"), rows)
    return 0


def _diff(parsed: argparse.Namespace) -> int:
    from megarl.checkpoint.inspection import differences

    found = differences(parsed.a, parsed.b, parsed.role)
    told = list(islice(found, None if parsed.json else parsed.limit))
    more = sum(1 for _ in found)
    rows = [(one.tensor, one.what, f"{one.largest:.6g}", f"{one.num_different} of {one.num_elements}") for one in told]
    if rows or parsed.json:
        _print(parsed, [asdict(one) for one in told], ("tensor", "differs in", "max |difference|", "elements"), rows)
    if not parsed.json:
        hidden = f", {more} not shown (--limit)" if more else ""
        print(f"{len(told) + more} tensors differ{hidden}" if told else "equal in every element")
    return 0


def _prune(parsed: argparse.Namespace) -> int:
    from megarl.checkpoint.pruning import plan_prune

    rules = {name: getattr(parsed, name) for name in ("keep_last", "keep_every_steps", "keep_best")}
    plan = plan_prune(parsed.run, **{name: value for name, value in rules.items() if value is not None})
    if not parsed.dry_run:
        plan.carry_out()
    done = "would be removed" if parsed.dry_run else "removed"
    told = {"rules": plan.rules, "kept": plan.kept, "removed": plan.removed, "untouched": plan.untouched, "bytes": plan.num_bytes}
    rows = [(name, "kept") for name in plan.kept] + [(name, done) for name in plan.removed]
    rows += [(name, f"left alone: {reason}") for name, reason in plan.untouched.items()]
    _print(parsed, told | {"dry_run": parsed.dry_run}, ("checkpoint", "what becomes of it"), sorted(rows))
    if not parsed.json:
        print(f"{plan.rules}: {len(plan.removed)} {done}, {_bytes(plan.num_bytes)}")
    return 0


# ---------------------------------------------------------------- printing
def _print(parsed: argparse.Namespace, told: Any, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """`told` as JSON when asked for, else the rows as a table."""
    if parsed.json:
        print(json.dumps(told, indent=1))
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Console().render_str(cell, markup=False, highlight=False) for cell in row))
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


def _sentence(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_sentence(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _bytes(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


# ---------------------------------------------------------------- values
def size_in_bytes(text: str) -> int:
    """`5GB`, `500 MB`, `2GiB` or plain bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or float(found[1]) * UNITS[found[2].upper()] < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a size such as 5GB, 500MB or 2GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a whole number of at least 1")
    return int(text)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int] | None]] = {
    "export": ("write a checkpoint as a Hugging Face directory", add_export, run_export),
    "import": ("write a Hugging Face directory, or a Megatron-LM checkpoint, as a megarl checkpoint", add_import, run_import),
    "checkpoint": ("list, verify, show, compare or remove checkpoints", add_checkpoint, None),
}
