"""The course: make data, SFT, reward model, PPO, export, verification, report. Each stage is the command a cluster runs.

python -m megarl.quickstart.course [--layout tp2pp2dp1] [--seed 0] [--out runs/quickstart] [stage:key=value ...]
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megarl.config import PpoRun, Run
from megarl.config_file import load_run, to_yaml
from megarl.errors import ConfigError, LayoutError, MegarlError, SetupError
from megarl.metrics.terminal import PPO_HEADLINE
from megarl.quickstart.stage import Stage

ROOT = Path(__file__).parents[2]
FOLDER = "runs/quickstart"  # where the paths in configs/quickstart point
MARKER = "quickstart-of-megarl"  # a folder with this file is ours to wipe
STAGES = ("sft", "reward", "ppo")
HEADLINES = {
    "sft": {"loss": "loss", "held-out": "eval/loss"},
    "reward": {"loss": "loss", "held-out accuracy": "eval/pair_accuracy"},
    "ppo": PPO_HEADLINE,
}
PLAIN_WIDTH = 140  # columns where the output is not a terminal


@dataclass(frozen=True)
class Layout:
    """`tp2pp2dp1`: tensor x pipeline x data ranks."""

    tensor: int
    pipeline: int
    data: int

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Raises `LayoutError` for another form."""
        match = re.fullmatch(r"tp([1-9]\d*)pp([1-9]\d*)dp([1-9]\d*)", text)
        if match is None:
            raise LayoutError(f"LAYOUT is {text!r}; expected a form like tp2pp2dp1 (tensor, pipeline, data)")
        return cls(*map(int, match.groups()))

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        return f"tp{self.tensor}pp{self.pipeline}dp{self.data}"


@dataclass(frozen=True)
class Course:
    """One quickstart: where it goes, how it is spread over ranks, what differs from configs/quickstart."""

    out: Path
    layout: Layout
    seed: int
    overrides: tuple[str, ...] = ()  # stage:key=value

    def run_of(self, stage: str) -> Run:
        """The configuration of `sft`, `reward` or `ppo`, with this course's folder, seed and layout."""
        config = ROOT / "configs" / "quickstart" / f"{stage}.yaml"
        tree = _moved(yaml.safe_load(config.read_text(encoding="utf-8")), str(self.out))
        keys = {"seed": self.seed, "parallel.tensor": self.layout.tensor, "parallel.pipeline": self.layout.pipeline}
        if self.layout.tensor == 1:
            keys["parallel.sequence"] = "false"
        if stage == "ppo":
            keys["log.samples"] = 50  # among so many held-out prompts the report finds some that changed
        overrides = [f"{key}={value}" for key, value in keys.items()]
        overrides += [override.split(":", 1)[1] for override in self.overrides if override.startswith(f"{stage}:")]
        with tempfile.TemporaryDirectory() as scratch:
            moved = Path(scratch) / config.name
            moved.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
            return load_run(stage, moved, overrides)

    def prepare(self) -> dict[str, Run]:
        """Check and write the three configurations, with nothing started; an earlier quickstart in the same folder is removed.

        Raises `ConfigError` or `SetupError`.
        """
        for override in self.overrides:
            if override.split(":", 1)[0] not in STAGES or "=" not in override:
                raise ConfigError(f"found {override!r}; expected STAGE:key=value, STAGE one of {', '.join(STAGES)}")
        runs = {stage: self.run_of(stage) for stage in STAGES}
        _check_gpus(self.layout)
        try:
            _wipe(self.out)
            (self.out / "configs").mkdir(parents=True)
            (self.out / MARKER).write_text("bash launch/quickstart.sh removes and rewrites this folder\n")
            for stage, run in runs.items():
                (self.out / "configs" / f"{stage}.yaml").write_text(to_yaml(run), encoding="utf-8")
        except OSError as error:
            raise SetupError(f"OUT: {error.filename} cannot be written: {error.strerror}; choose another folder with OUT=...") from None
        return runs

    def stages(self, runs: dict[str, Run]) -> Iterator[tuple[str, Stage]]:
        """All stages in order, with the name under which their seconds are added up."""
        yield "data", self._python("data", "make_data", self.out / "data", "--seed", self.seed)
        for stage in STAGES:
            run = runs[stage]
            yield (
                stage,
                Stage(
                    stage,
                    ["bash", str(ROOT / "launch" / "torchrun.sh"), stage, str(self.out / "configs" / f"{stage}.yaml")],
                    self._log(stage),
                    {"NPROC": str(self.layout.world_size)},
                    run.output_dir / "metrics.jsonl",
                    run.ppo.total_steps if isinstance(run, PpoRun) else run.train.total_steps,
                    HEADLINES[stage],
                ),
            )
        export, heldout, trained = self.out / "export", runs["ppo"].eval.path, self.out / "verify" / "trained.safetensors"
        yield "export", self._command("export", [sys.executable, "-m", "megarl", "export", self.out / "ppo", export])
        (self.out / "verify").mkdir(exist_ok=True)
        arguments = (self.out / "ppo", self.out / "sft", runs["ppo"].tokenizer, heldout, trained)
        yield (
            "verify",
            Stage(
                "verify",
                ["bash", str(ROOT / "launch" / "torchrun.sh"), *map(str, arguments)],
                self._log("trained"),
                {"NPROC": "1", "MEGARL_MODULE": "megarl.quickstart.trained"},
            ),
        )
        result = self.out / "verify" / "verification.json"
        yield "verify", self._python("verify", "verify", export, heldout, trained, runs["ppo"].rollout.max_response_tokens, result)

    def _python(self, name: str, module: str, *arguments: object) -> Stage:
        return self._command(name, [sys.executable, "-m", f"megarl.quickstart.{module}", *arguments])

    def _command(self, name: str, command: Sequence[object]) -> Stage:
        return Stage(name, [str(word) for word in command], self._log(name))

    def _log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"


def take(course: Course, console: Console) -> dict:
    """Run the whole course and return its summary. Raises `MegarlError` when a stage fails."""
    runs = course.prepare()
    console.print(f"quickstart {course.layout}, {course.layout.world_size} ranks, seed {course.seed}, in {course.out}", soft_wrap=True)
    seconds: dict[str, float] = {}
    for name, stage in course.stages(runs):
        seconds[name] = seconds.get(name, 0.0) + stage.run(console)
    from megarl.quickstart import report  # matplotlib, only now

    summary = report.summarize(course.out, str(course.layout), seconds)
    picture = course.out / "curves.png"
    report.draw(summary["ppo"]["curve"], picture)
    report.write_summary(summary, course.out / "summary.json")
    report.show(summary, report.answers(report.read_lines(course.out / "ppo" / "samples.jsonl")), picture, console)
    console.print(f"summary: {course.out / 'summary.json'}", soft_wrap=True)
    return summary


def default_layout(num_gpus: int) -> str:
    """Tensor 2 x pipeline 2 where ranks may share processors (no GPU) or there are enough GPUs, one GPU a rank."""
    if num_gpus in (0, 4) or num_gpus > 4:
        return "tp2pp2dp1"
    return "tp2pp1dp1" if num_gpus >= 2 else "tp1pp1dp1"


def _num_gpus() -> int:
    return int(os.environ.get("MEGARL_HOST_GPUS", "0"))  # launch/env.sh counts them


def _check_gpus(layout: Layout) -> None:
    if 0 < _num_gpus() < layout.world_size:
        raise LayoutError(f"layout {layout} needs {layout.world_size} GPUs, this machine has {_num_gpus()}: choose another LAYOUT")


def _moved(tree: Any, out: str) -> Any:
    """A configuration tree whose paths under `FOLDER` lie under `out` instead."""
    if isinstance(tree, dict):
        return {key: _moved(value, out) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_moved(value, out) for value in tree]
    return out + tree[len(FOLDER) :] if isinstance(tree, str) and (tree + "/").startswith(FOLDER + "/") else tree


def _wipe(out: Path) -> None:
    """Remove an earlier quickstart. Raises `SetupError` for a folder of something else."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARKER).is_file():
            raise SetupError(f"OUT={out} exists and is no earlier quickstart: choose another folder, or remove it yourself")
        shutil.rmtree(out)


def main() -> int:
    """Command line entry; the exit code."""
    parser = argparse.ArgumentParser(prog="launch/quickstart.sh", description="The whole course on one machine, end to end.")
    parser.add_argument("--layout", default=os.environ.get("LAYOUT") or default_layout(_num_gpus()), help="[LAYOUT, tp2pp2dp1]")
    parser.add_argument("--seed", type=int, default=os.environ.get("SEED", "0"), help="[SEED, 0]")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or FOLDER), help="folder [OUT, runs/quickstart]")
    parser.add_argument("overrides", nargs="*", metavar="stage:key=value", help="change configs/quickstart, as in ppo:ppo.total_steps=10")
    parsed = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    try:
        take(Course(parsed.out.resolve(), Layout.parse(parsed.layout), parsed.seed, tuple(parsed.overrides)), console)
    except MegarlError as error:
        for line in str(error).splitlines():
            print(f"megarl: error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("megarl: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
