"""Do DPO and RRHF learn? Held-out pairs and held-out answers of the quickstart's task before and after each lesson, by seed.

`python -m benchmarks.learning_lessons [--seeds 0 1 2] [--quick] [--only NAME,NAME] [--keep DIR] [--json PATH]`

Every seed makes its data and starts with the quickstart's fine-tuning, whose demonstrations forget six carries out of ten. DPO (beta 0.5,
and 0.1 with a share of imitation) and IPO then learn from the quickstart's pairs (the right sum and a wrong one), RRHF from lists of the
right sum and up to three wrong ones, each for 150 steps of 64 examples on one rank. `rrhf online` takes as many steps in three rounds of
`launch/rrhf_rounds.sh`, each on eight responses to 2,000 prompts from the model of the round before, with the exact answer as their score.
`pairs`: the share of held-out pairs, or of pairs of held-out lists, in which the better response is the likelier one (for RRHF per token).
`accuracy`: the share of 1,000 held-out problems whose likeliest answer is right. `benchmarks.learning` prints these rows below its own.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.table import print_table
from megarl.config import Run
from megarl.config_file import load_run, to_yaml
from megarl.data.tokenizers import load_tokenizer
from megarl.quickstart.make_data import answer, make_data, plausible_error, question

ROOT = Path(__file__).parents[1]
STEPS, QUICK_STEPS = 150, 39
ROUNDS = 3
TARGET_POINTS = 10


@dataclass(frozen=True)
class Subject:
    """A lesson of the table: the command, the metric that asks which response is likelier, what differs from configs/quickstart."""

    kind: str
    metric: str
    overrides: tuple[str, ...] = ()
    is_online: bool = False


LESSONS = {
    "dpo": Subject("dpo", "likelier_is_chosen"),
    "dpo with nll": Subject("dpo", "likelier_is_chosen", ("dpo={beta: 0.1, nll_coef: 0.2}",)),
    "ipo": Subject("dpo", "likelier_is_chosen", ("dpo={loss: ipo, beta: 0.1}",)),
    "rrhf": Subject("rrhf", "pair_accuracy"),
    "rrhf online": Subject("rrhf", "pair_accuracy", is_online=True),
}


@dataclass(frozen=True)
class Classroom:
    """The files of one seed."""

    folder: Path
    seed: int

    def run_of(self, kind: str, name: str, overrides: Sequence[str]) -> Run:
        """A run of configs/quickstart on one rank, in this folder."""
        data = self.folder / "data"
        paths = [f"output_dir={self.folder / name}", f"tokenizer={data / 'tokenizer.model'}", f"seed={self.seed}"]
        paths += [f"{'actor' if kind == 'sample' else 'model'}.path={data / 'model' if kind == 'sft' else self.folder / 'sft'}"]
        files = {
            "sft": ("sft.jsonl", None),
            "sample": ("prompts.jsonl", None),
            "dpo": ("preferences.jsonl", "heldout_preferences.jsonl"),
            "rrhf": ("lists.jsonl", "heldout_lists.jsonl"),
        }
        path, held_out = files[kind]
        paths += [f"data.path={data / path}"] + ([f"data.eval_path={data / held_out}"] if held_out else [])
        layout = ["parallel={microbatch_size: 256}", "checkpoint.background=off"]
        return load_run(kind, ROOT / "configs" / "quickstart" / f"{kind}.yaml", [*paths, *layout, *overrides])

    def make(self) -> None:
        """Data, and lists for RRHF beside the quickstart's own."""
        data = self.folder / "data"
        make_data(data, self.seed)
        rng = random.Random(self.seed)
        for pairs, lists in (("preferences.jsonl", "lists.jsonl"), ("heldout_preferences.jsonl", "heldout_lists.jsonl")):
            rows = [json.loads(line) for line in (data / pairs).read_text(encoding="utf-8").splitlines()]
            problems = [tuple(map(int, row["prompt"][:-1].split("+"))) for row in rows]
            (data / lists).write_text("".join(json.dumps(ranked(problem, rng)) + "\n" for problem in problems), encoding="utf-8")


def ranked(problem: tuple[int, int], rng: random.Random) -> dict[str, Any]:
    """The right sum and wrong ones, scored by how many digits are right."""
    right = answer(sum(problem))
    answers = [right, *sorted({answer(plausible_error(problem, rng)) for _ in range(3)})]
    scores = [sum(a == b for a, b in zip(text, right)) / len(right) for text in answers]
    return {"prompt": question(problem), "responses": answers, "scores": scores}


def rows(seeds: Sequence[int], quick: bool, names: Sequence[str], keep: Path | None = None) -> list[dict[str, Any]]:
    """A row for each lesson and seed, in a process a seed: pairs right and held-out accuracy, before and after.

    With `keep` the runs stay there, and those that are there to their end are not repeated.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="megarl-lessons-") as scratch:
        for seed in seeds:
            folder = (keep or Path(scratch)) / f"lessons-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            command = [
                sys.executable,
                "-m",
                "benchmarks.learning_lessons",
                "--classroom",
                str(folder),
                str(seed),
                "--only",
                ",".join(names),
            ]
            subprocess.run(command + (["--quick"] if quick else []), check=True, cwd=ROOT, stdout=sys.stderr)
            found += [json.loads(row_file(folder, name).read_text(encoding="utf-8")) for name in names]
    return found


def row_file(folder: Path, name: str) -> Path:
    """Where the row of a lesson is kept."""
    return folder / f"{name.replace(' ', '-')}.json"


def hold(classroom: Classroom, names: Sequence[str], quick: bool) -> None:
    """Fine-tunes once, then teaches every lesson from there, and leaves a row of each."""
    from megarl.course.sft import train_sft
    from megarl.parallel import groups
    from megarl.quickstart.probes import answered_right, read_probes
    from megarl.quickstart.trained import actor_logits

    start = classroom.run_of("sft", "sft", ())
    layout = groups.initialize(start.parallel, start.seed)
    if not (classroom.folder / "sft" / "finished").exists():
        classroom.make()
        train_sft(start, layout)
        (classroom.folder / "sft" / "finished").touch()
    probes = read_probes(classroom.folder / "data" / "heldout.jsonl", load_tokenizer(start.tokenizer))

    def accuracy(model: Path) -> float:
        return answered_right(actor_logits(model, probes.sequences, layout), probes)

    for name in (name for name in names if not row_file(classroom.folder, name).exists()):
        models = taught(classroom, name, QUICK_STEPS if quick else STEPS, layout)
        pairs = [pair for model in models for pair in held_out_pairs(model, LESSONS[name].metric)]
        row = {"name": name, "seed": classroom.seed, "pairs before": pairs[0], "pairs after": pairs[-1]}
        row |= {"before": accuracy(classroom.folder / "sft"), "after": accuracy(models[-1])}
        row_file(classroom.folder, name).write_text(json.dumps(row), encoding="utf-8")


def taught(classroom: Classroom, name: str, steps: int, layout: Any) -> list[Path]:
    """Runs a lesson for so many steps; the models it made, the last one last."""
    from megarl.course.dpo import train_dpo
    from megarl.course.rrhf import train_rrhf

    subject = LESSONS[name]
    if subject.is_online:
        return taught_in_rounds(classroom, name, steps // ROUNDS)
    run = classroom.run_of(subject.kind, name, (f"train.total_steps={steps}", *subject.overrides))
    teach: Callable = {"dpo": train_dpo, "rrhf": train_rrhf}[subject.kind]
    teach(run, layout)
    return [run.output_dir]


def taught_in_rounds(classroom: Classroom, name: str, steps: int) -> list[Path]:
    """`launch/rrhf_rounds.sh` with so many steps a round; the models of the rounds."""
    out = classroom.folder / name.replace(" ", "-")
    out.mkdir(exist_ok=True)
    changes = {"sample": ("sample.num_prompts=2000",), "rrhf": (f"train.total_steps={steps}",)}
    for kind, overrides in changes.items():
        (out / f"{kind}.yaml").write_text(to_yaml(classroom.run_of(kind, "unused", overrides)), encoding="utf-8")
    settings = {"ROUNDS": str(ROUNDS), "SEED": str(classroom.seed), "NPROC": "1", "MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable}
    command = ["bash", str(ROOT / "launch" / "rrhf_rounds.sh"), str(out / "sample.yaml"), str(out / "rrhf.yaml"), str(out)]
    subprocess.run(
        command, check=True, env={k: v for k, v in os.environ.items() if not k.startswith("MEGARL_")} | settings, stdout=sys.stderr
    )
    return [out / f"round-{number + 1}" / "model" for number in range(ROUNDS)]


def held_out_pairs(model: Path, metric: str) -> list[float]:
    """What a run logged about its held-out pairs, from first to last."""
    log = [json.loads(line) for line in (model / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[f"eval/{metric}"] for line in log if f"eval/{metric}" in line]


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a lesson: means over seeds in percent, and what was gained in points, with its standard deviation."""
    table = []
    for name in dict.fromkeys(row["name"] for row in found):
        mine = [row for row in found if row["name"] == name]
        row: dict[str, Any] = {"lesson": name}
        for key in ("pairs before", "pairs after", "before", "after"):
            row[f"{key}, %"] = round(100 * mean(one[key] for one in mine), 1)
        gains = [100 * (one["after"] - one["before"]) for one in mine]
        pair_gains = [100 * (one["pairs after"] - one["pairs before"]) for one in mine]
        table.append(
            row
            | {
                "gained, points": round(mean(gains), 1),
                "std": round(stdev(gains), 1) if len(gains) > 1 else None,
                "by seed": " ".join(f"{gain:+.1f}" for gain in gains),
                f"all above {TARGET_POINTS}": min(gains + pair_gains) >= TARGET_POINTS,
            }
        )
    return table


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_lessons", description="Do DPO and RRHF learn?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps instead of {STEPS}")
    parser.add_argument("--only", default=",".join(LESSONS), help="lessons by name, commas between them [%(default)s]")
    parser.add_argument("--keep", type=Path, help="keep runs here, and do not repeat those that are here to their end")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--classroom", nargs=2, metavar=("FOLDER", "SEED"), help=argparse.SUPPRESS)  # one seed, in this process
    arguments = parser.parse_args()
    names = [name for name in LESSONS if name in arguments.only.split(",")]
    if arguments.classroom:
        folder, seed = arguments.classroom
        hold(Classroom(Path(folder), int(seed)), names, arguments.quick)
        return
    found = rows(arguments.seeds, arguments.quick, names, arguments.keep)
    print_table("each seed", found)
    print_table("mean and standard deviation over seeds", summary(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
