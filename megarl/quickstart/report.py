"""What a finished quickstart shows: summary.json, a table, three held-out prompts before and after, a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files; before pyplot

from matplotlib import pyplot  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megarl.errors import MegarlError  # noqa: E402
from megarl.run_folder import versions  # noqa: E402

NUM_ANSWERS = 3
REWARD, KL, HELD_OUT = "reward/mean", "kl/token_mean", "eval/accuracy"


@dataclass(frozen=True)
class Answer:
    """A held-out prompt, what is right, and what the model said before and after PPO."""

    prompt: str
    right: str
    before: str
    after: str


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def last_value(lines: Sequence[Mapping[str, float]], name: str) -> float:
    """The newest value of a metric. Raises `MegarlError` when the stage never reported it."""
    found = [line[name] for line in lines if name in line]
    if not found:
        raise MegarlError(f"the stage reported no {name}; its metrics.jsonl knows {sorted({key for line in lines for key in line})}")
    return found[-1]


def first_value(lines: Sequence[Mapping[str, float]], name: str) -> float:
    """The oldest value of a metric."""
    return last_value(lines[::-1], name)


def curve(lines: Sequence[Mapping[str, float]]) -> list[dict[str, float | None]]:
    """One point a step: reward and KL of its rollout, accuracy on held-out prompts where it was measured, else None."""
    return [{"step": line["step"], "reward": line.get(REWARD), "kl": line.get(KL), "accuracy": line.get(HELD_OUT)} for line in lines]


def summarize(out: Path, layout: str, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of a quickstart folder whose stages are all done."""
    reward, ppo = (read_lines(out / stage / "metrics.jsonl") for stage in ("reward", "ppo"))
    trained = json.loads((out / "verify" / "trained.json").read_text())
    return {
        "versions": versions(),
        "layout": layout,
        "sft": {"heldout_accuracy": trained["sft_heldout_accuracy"]},
        "reward": {"heldout_pair_accuracy": last_value(reward, "eval/pair_accuracy")},
        "ppo": {
            "heldout_accuracy_before": first_value(ppo, HELD_OUT),
            "heldout_accuracy_after": last_value(ppo, HELD_OUT),
            "curve": curve(ppo),
        },
        "export": {"path": str(out / "export"), **json.loads((out / "verify" / "verification.json").read_text())},
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
    }


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write the numbers as JSON."""
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def answers(samples: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Held-out prompts answered in the first and in the last evaluation of samples.jsonl; those that changed for the better come first."""
    evaluations = [sample for sample in samples if sample.get("kind") == "eval"]
    if not evaluations:
        return []
    first, last = evaluations[0]["step"], evaluations[-1]["step"]
    after = {sample["prompt"]: sample for sample in evaluations if sample["step"] == last}
    pairs = [(sample, after[sample["prompt"]]) for sample in evaluations if sample["step"] == first and sample["prompt"] in after]
    pairs.sort(key=lambda pair: pair[0]["accuracy"] - pair[1]["accuracy"])
    return [Answer(a["prompt"], a["answer"], a["response"], b["response"]) for a, b in pairs[:NUM_ANSWERS]]


def draw(points: Sequence[Mapping[str, float | None]], path: Path) -> None:
    """Reward, held-out accuracy and KL over the steps of PPO, as a PNG."""
    panels = (("reward", "reward (mean of the rollout)"), ("accuracy", "held-out accuracy, greedy"), ("kl", "KL to the SFT model, a token"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, panels):
        known = [(point["step"], point[name]) for point in points if point[name] is not None]
        axis.plot(*zip(*known), color="#1f5fa8", marker="o" if len(known) < 40 else None, markersize=3, linewidth=1.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("PPO step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if name == "accuracy":
            axis.set_ylim(0, 1)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def show(summary: Mapping[str, Any], shown: Sequence[Answer], picture: Path, console: Console) -> None:
    """Print the small table, the answers and where things are."""
    ppo, export, seconds = summary["ppo"], summary["export"], summary["seconds"]
    agreement = f"vLLM agrees on {export['vllm_greedy_agreement']:.1%} of prompts"
    rows = [
        ("data", ""),
        ("sft", f"held-out accuracy {summary['sft']['heldout_accuracy']:.1%}"),
        ("reward", f"held-out pairs ranked right {summary['reward']['heldout_pair_accuracy']:.1%}"),
        ("ppo", f"held-out accuracy {ppo['heldout_accuracy_before']:.1%} -> {ppo['heldout_accuracy_after']:.1%}"),
        ("export", export["path"]),
        ("verify", f"logits within {export['max_abs_logit_difference']:.1e}, {agreement}"),
    ]
    table = Table(title=f"quickstart, {summary['layout']}", title_justify="left")
    for name, justify in (("stage", "left"), ("seconds", "right"), ("result", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    for stage, result in rows:
        table.add_row(stage, f"{seconds[stage]:.0f}", result)
    table.add_row("all", f"{sum(seconds.values()):.0f}", f"curves: {picture}")
    console.print(table)
    if shown:
        table = Table(title="held-out prompts", title_justify="left")
        for name in ("prompt", "right answer", "before PPO", "after PPO"):
            table.add_column(name)
        for answer in shown:
            table.add_row(answer.prompt, answer.right, answer.before, answer.after)
        console.print(table)
