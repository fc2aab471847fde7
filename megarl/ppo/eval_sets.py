"""The held-out sets of a run and the names of what an evaluation reports. Pure: no torch."""

from collections.abc import Iterator

from megarl.config import EvalSet, PpoRun, RewardPart
from megarl.config_file import Fault
from megarl.rewards.check import CAN_PASS, distinct_names
from megarl.rewards.pass_at_k import reported_ks

SHORT = ""  # the name of the set that `eval.path` alone describes


def eval_sets(run: PpoRun) -> list[EvalSet]:
    """The held-out sets of a run; the short form first, read as the run's own data and judged by `exact`."""
    if run.eval is None:
        return []
    short = []
    if run.eval.path is not None:
        data = run.data.for_file(run.eval.path)
        metrics = (RewardPart(kind="exact"),)
        short = [EvalSet.model_construct(name=SHORT, data=data, metrics=metrics, num_prompts=run.eval.num_prompts)]
    return [*short, *run.eval.sets]


def prefix_of(held_out: EvalSet) -> str:
    """`eval/` for the short form, else `eval/<name>/`."""
    return f"eval/{held_out.name}/" if held_out.name != SHORT else "eval/"


def metric_names(held_out: EvalSet) -> list[str]:
    """The names of a set's metrics, one for each part: kinds, but `accuracy` in the short form."""
    return ["accuracy"] if held_out.name == SHORT else distinct_names([part.kind for part in held_out.metrics])


def sampled_names(name: str, kind: str, num_samples: int) -> list[str]:
    """What is reported of the sampled responses under the metric `name`: `<name>/mean@n`, and `<name>/pass@k` where a response can pass."""
    if num_samples == 0:
        return []
    passing = [f"{name}/pass@{k}" for k in reported_ks(num_samples)] if kind in CAN_PASS else []
    return [f"{name}/mean@{num_samples}", *passing]


def reported_names(held_out: EvalSet) -> list[str]:
    """Everything that an evaluation of the set reports, by its whole name."""
    found = ["response_length", "truncated_share"]
    for name, part in zip(metric_names(held_out), held_out.metrics, strict=True):
        found += [name, *sampled_names(name, part.kind, held_out.samples)]
    return [prefix_of(held_out) + name for name in found]


def evaluation_faults(run: PpoRun) -> Iterator[Fault]:
    """Held-out sets that say nothing or speak with one name, and a best checkpoint by what nobody reports."""
    if run.eval is not None and run.eval.path is None and not run.eval.sets:
        yield Fault(("eval",), "eval: found neither path nor sets; expected one of them, or no eval")
    sets = run.eval.sets if run.eval is not None else ()
    names = [held_out.name for held_out in sets]
    for number, held_out in enumerate(sets):
        key, first = f"eval.sets.{number}", names.index(held_out.name)
        if first != number:
            text = f"{key}.name: found {held_out.name!r} once more; expected another name than eval.sets.{first} has"
            yield Fault((f"{key}.name",), text)
        if not held_out.metrics:
            yield Fault((f"{key}.metrics",), f"{key}.metrics: found an empty list; expected at least one, such as {{kind: exact}}")
    yield from _keep_best(run)


def _keep_best(run: PpoRun) -> Iterator[Fault]:
    knob, best = "checkpoint.keep_best", (run.checkpoint.keep_best or "").removeprefix("-")
    known = [name for held_out in eval_sets(run) for name in reported_names(held_out)]
    known += [f"ema/{name}" for name in known] if run.eval is not None and run.eval.ema else []
    if best.startswith(("eval/", "ema/eval/")) and best not in known:
        near = ", ".join(known) if known else "a metric of the rollouts, such as reward/mean: the run has no eval"
        yield Fault((knob, "eval"), f"{knob}: found {run.checkpoint.keep_best}; expected one of {near}")
