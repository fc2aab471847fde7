"""Does every online algorithm learn? Held-out accuracy on the quickstart's task before and after a small fixed budget, over seeds.

`python -m benchmarks.learning [--quick] [--seeds 3] [--only NAME,NAME] [--keep DIR] [--json PATH]`

For each seed: the quickstart's data, its SFT lesson (whose demonstrations forget carries: the model starts near a third right) and its
reward model, once. Then each algorithm, from that SFT model, on one rank: `STEPS` steps of 64 prompts x 8 samples with the exact answer as
the only reward; accuracy is greedy, on the 1,000 held-out problems, before the first and after the last step. Critics start from the
reward model. Every run is the command a user types. `--quick` takes one seed and a third of the steps. A second table tells the same of
the lessons on files (`benchmarks.learning_lessons`).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import learning_lessons
from benchmarks.table import main
from megarl.config_file import to_yaml
from megarl.quickstart.course import Course, Layout
from megarl.quickstart.make_data import make_data

STEPS = 30
TARGET_POINTS = 10
EXACT = "ppo:rewards=[{kind: exact}]"
NO_CRITIC = ("critic=null", "ppo.critic_warmup_steps=0")
IN_LOSS = "ppo.kl={place: loss, estimator: k3, coef: 0.001}"
GRPO = (*NO_CRITIC, "ppo.advantage=grpo", "ppo.aggregation=sequence_mean", IN_LOSS)
# What differs from configs/quickstart/ppo.yaml with the exact answer as its reward.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "ppo (gae)": (),
    "single_step": ("ppo.advantage=single_step",),
    "rloo": (*NO_CRITIC, "ppo.advantage=rloo"),
    "grpo": GRPO,
    "dr_grpo": (*NO_CRITIC, "ppo.advantage=dr_grpo", "ppo.aggregation=sequence_sum_fixed", "ppo.kl.coef=0"),
    "remax": (*NO_CRITIC, "ppo.advantage=remax"),
    "reinforce_pp": (*NO_CRITIC, "ppo.advantage=reinforce_pp"),
    "reinforce_pp_baseline": (*NO_CRITIC, "ppo.advantage=reinforce_pp_baseline"),
    "gspo": (*GRPO, "ppo.ratio_level=sequence", "ppo.clip_low=0.01", "ppo.clip_high=0.01"),
    "cispo": (*GRPO, "ppo.loss=cispo"),
    "dapo": (*NO_CRITIC, "ppo.advantage=grpo", "ppo.kl.coef=0", "ppo.clip_high=0.28", "rollout.refill={rounds: 4}"),
}


def command(kind: str, course: Course, name: str) -> dict[str, float]:
    """Run `megarl KIND` in a process of its own as the quickstart's stage of that kind, in the folder `name`: first and last accuracy.

    A run that is there already, to its end, is not repeated.
    """
    run = course.run_of(kind)
    run = run.model_copy(update={"output_dir": run.output_dir.with_name(name)})
    config = course.out / "configs" / f"{name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    log = course.out / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    if not (run.output_dir / "finished").exists():
        config.write_text(to_yaml(run), encoding="utf-8")
        with log.open("wb") as said:
            done = subprocess.run([sys.executable, "-m", "megarl", kind, str(config)], stdout=said, stderr=said)
        if done.returncode != 0:
            raise SystemExit(f"megarl {kind} failed as {name}: {log.read_text()[-2000:]}")
        (run.output_dir / "finished").touch()
    lines = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    seen = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    return {"before": seen[0], "after": seen[-1]} if seen else {}


def start(out: Path, seed: int) -> None:
    """Data, SFT model and reward model of a seed."""
    if not (out / "data").exists():
        make_data(out / "data", seed)
    course = Course(out, Layout(1, 1, 1), seed)
    for stage in ("sft", "reward"):
        command(stage, course, stage)


def learn(out: Path, seed: int, algorithm: str, steps: int) -> dict[str, float]:
    """Accuracy before and after `steps` steps of an algorithm."""
    own = [f"ppo:{override}" for override in ALGORITHMS[algorithm]]
    common = [EXACT, f"ppo:ppo.total_steps={steps}", "ppo:eval.every_steps=0", "ppo:parallel.microbatch_size=256"]
    name = "".join(letter if letter.isalnum() else "-" for letter in algorithm)
    return command("ppo", Course(out, Layout(1, 1, 1), seed, (*common, *own)), name)


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """A row an algorithm: accuracies in percent, what was gained in points, mean and standard deviation over seeds."""
    rows = []
    for name, runs in found.items():
        gains = [100 * (run["after"] - run["before"]) for run in runs]
        rows.append(
            {
                "algorithm": name,
                "before, %": round(100 * mean(run["before"] for run in runs), 1),
                "after, %": round(100 * mean(run["after"] for run in runs), 1),
                "gained, points": round(mean(gains), 1),
                "std": round(stdev(gains), 1) if len(gains) > 1 else None,
                "by seed": " ".join(f"{gain:+.1f}" for gain in gains),
                f"all above {TARGET_POINTS}": min(gains) >= TARGET_POINTS,
            }
        )
    return rows


def measure(quick: bool, seeds: int, only: str | None, keep: Path | None) -> Mapping[str, Any]:
    """Rows of all algorithms and lessons."""
    names, lessons = (
        [name for name in known if only is None or name in only.split(",")] for known in (ALGORITHMS, learning_lessons.LESSONS)
    )
    steps, seeds = (STEPS // 3, 1) if quick else (STEPS, seeds)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="megarl-learning-") as scratch:
        for seed in range(seeds if names else 0):
            out = (keep or Path(scratch)) / f"seed-{seed}"
            start(out, seed)
            for name in names:
                found[name].append(learn(out, seed, name, steps))
                print(f"seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    tables = {f"Held-out accuracy before and after {steps} steps, {seeds} seeds": table(found)} if names else {}
    if lessons:
        rows = learning_lessons.rows(range(seeds), quick, lessons, keep)
        tables[f"Lessons on files: held-out pairs and accuracy before and after, {seeds} seeds"] = learning_lessons.summary(rows)
    return tables


if __name__ == "__main__":
    main(
        "learning",
        "What the online algorithms learn on the quickstart's task",
        measure,
        {
            "seeds": {"type": int, "default": 3, "help": "runs an algorithm [3]"},
            "only": {"help": f"by name, commas between them [all: {', '.join([*ALGORITHMS, *learning_lessons.LESSONS])}]"},
            "keep": {"type": Path, "help": "keep runs here, and do not repeat those that are here to their end"},
        },
    )
