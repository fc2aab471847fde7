"""Do DPO and RRHF learn? Held-out pairs and held-out answers of the quickstart's task before and after each lesson, by seed.

`python -m benchmarks.learning_lessons [--seeds 0 1 2] [--quick] [--json PATH]`

Every seed makes its data and starts with the quickstart's fine-tuning, whose demonstrations forget six carries out of ten. DPO and IPO
then learn from the quickstart's pairs (the right sum and a wrong one), RRHF from lists of the right sum and up to three wrong ones, each
for 150 steps of 64 examples on one rank. `pairs`: the share of held-out pairs, or of pairs of held-out lists, in which the better
response is the likelier one (for RRHF per token). `accuracy`: the share of 1,000 held-out problems whose likeliest answer is right.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.table import print_table
from megarl.config import Run
from megarl.config_file import load_run
from megarl.data.tokenizers import load_tokenizer
from megarl.quickstart.make_data import answer, make_data, plausible_error, question

CONFIGS = Path(__file__).parents[1] / "configs" / "quickstart"
STEPS, QUICK_STEPS = 150, 40
LESSONS = {
    "dpo": ("dpo", "likelier_is_chosen", ()),
    "ipo": ("dpo", "likelier_is_chosen", ("dpo={loss: ipo, beta: 0.1}",)),
    "rrhf": ("rrhf", "pair_accuracy", ()),
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
        paths += [f"model.path={data / 'model' if kind == 'sft' else self.folder / 'sft'}"]
        files = {
            "sft": ("sft.jsonl", None),
            "dpo": ("preferences.jsonl", "heldout_preferences.jsonl"),
            "rrhf": ("lists.jsonl", "heldout_lists.jsonl"),
        }
        path, held_out = files[kind]
        paths += [f"data.path={data / path}"] + ([f"data.eval_path={data / held_out}"] if held_out else [])
        layout = ["parallel={microbatch_size: 256}", "checkpoint.background=off"]
        return load_run(kind, CONFIGS / f"{kind}.yaml", [*paths, *layout, *overrides])

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


def rows(seeds: Sequence[int], quick: bool = False) -> list[dict[str, Any]]:
    """A row for each lesson and seed, in a process a seed: pairs right and held-out accuracy (before, after), seconds of the lesson."""
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            command = [sys.executable, "-m", "benchmarks.learning_lessons", "--classroom", folder, str(seed), str(out)]
            subprocess.run(command + (["--quick"] if quick else []), check=True)
            found += json.loads(out.read_text(encoding="utf-8"))
    return found


def lessons_of(classroom: Classroom, quick: bool) -> Iterator[dict[str, Any]]:
    """Fine-tunes once, then teaches every lesson from there."""
    import time

    from megarl.course.dpo import train_dpo
    from megarl.course.rrhf import train_rrhf
    from megarl.course.sft import train_sft
    from megarl.parallel import groups
    from megarl.quickstart.probes import answered_right, read_probes
    from megarl.quickstart.trained import actor_logits

    classroom.make()
    start = classroom.run_of("sft", "sft", ())
    layout = groups.initialize(start.parallel, start.seed)
    train_sft(start, layout)
    probes = read_probes(classroom.folder / "data" / "heldout.jsonl", load_tokenizer(start.tokenizer))

    def accuracy(name: str) -> float:
        return answered_right(actor_logits(classroom.folder / name, probes.sequences, layout), probes)

    before = accuracy("sft")
    for name, (kind, metric, overrides) in LESSONS.items():
        run = classroom.run_of(kind, name, (f"train.total_steps={QUICK_STEPS if quick else STEPS}", *overrides))
        began = time.perf_counter()
        {"dpo": train_dpo, "rrhf": train_rrhf}[kind](run, layout)
        seconds = time.perf_counter() - began
        log = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        pairs = [line[f"eval/{metric}"] for line in log if f"eval/{metric}" in line]
        yield {
            "name": name,
            "seed": classroom.seed,
            "pairs before": pairs[0],
            "pairs after": pairs[-1],
            "before": before,
            "after": accuracy(name),
            "seconds": round(seconds, 1),
        }


def summary(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the seeds of each lesson."""
    table = []
    for name in dict.fromkeys(row["name"] for row in found):
        mine = [row for row in found if row["name"] == name]
        row: dict[str, Any] = {"lesson": name, "seeds": len(mine)}
        for key in ("pairs before", "pairs after", "before", "after"):
            values = [100 * one[key] for one in mine]
            row[f"{'accuracy ' if key in ('before', 'after') else ''}{key}, %"] = (
                f"{mean(values):.1f} +- {stdev(values) if len(values) > 1 else 0.0:.1f}"
            )
        table.append(row)
    return table


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning_lessons", description="Do DPO and RRHF learn?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps instead of {STEPS}")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--classroom", nargs=3, metavar=("FOLDER", "SEED", "OUT"), help=argparse.SUPPRESS)  # one seed, in this process
    arguments = parser.parse_args()
    if arguments.classroom:
        folder, seed, out = arguments.classroom
        found = list(lessons_of(Classroom(Path(folder), int(seed)), arguments.quick))
        Path(out).write_text(json.dumps(found), encoding="utf-8")
        return
    found = rows(arguments.seeds, arguments.quick)
    print_table("each seed", found)
    print_table("mean and standard deviation over seeds", summary(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
