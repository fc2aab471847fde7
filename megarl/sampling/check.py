"""What must fit together for `megarl sample`, and what `--check` says of it. Pure: read on any machine."""

from collections.abc import Iterator

from megarl.config import SampleRun
from megarl.config_file import Fault


def sample_faults(run: SampleRun) -> Iterator[Fault]:
    """Keys that contradict each other, or that belong to training."""
    rollout, options = run.rollout, run.sample
    if rollout.placement != "colocated":
        text = f"rollout.placement: found {rollout.placement}; expected colocated: nothing else runs on the ranks of megarl sample"
        yield Fault(("rollout.placement",), text)
    for name in ("refill", "partial", "length_schedule"):
        if getattr(rollout, name) is not None:
            yield Fault((f"rollout.{name}",), f"rollout.{name}: found a section; expected none: it is a part of megarl ppo")
    if options.greedy and rollout.samples_per_prompt > 1:
        text = f"found {rollout.samples_per_prompt} with sample.greedy true; expected 1: the likeliest response is always the same"
        yield Fault(("rollout.samples_per_prompt", "sample.greedy"), f"rollout.samples_per_prompt: {text}")
    if options.keep == "best" and not run.rewards:
        yield Fault(("sample.keep", "rewards"), "sample.keep: found best without rewards; expected all, or rewards that say which is best")
    if run.reward_hook is not None and not run.rewards:
        yield Fault(("reward_hook", "rewards"), "reward_hook: found without rewards; expected rewards whose sum it changes, or no hook")


def sample_rows(run: SampleRun, num_generators: int, longest: int) -> list[tuple[str, str]]:
    """Names and sentences about the work."""
    rollout = run.rollout
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    prompts = f"the first {run.sample.num_prompts} prompts" if run.sample.num_prompts else "all prompts"
    kept = "all responses" if run.sample.keep == "all" else "the best response"
    each = f"about {sequences / num_generators:.4g} sequences each"
    block = f"prompts {rollout.prompts_per_step} x samples {rollout.samples_per_prompt} = {sequences} sequences"
    return [
        ("generators", f"{num_generators} replicas x tensor {rollout.tensor_parallel}, {each}"),
        ("block", f"{block}; {prompts}, {kept} kept"),
        ("tokens a block", f"at most {sequences} x {longest} = {sequences * longest:,}"),
    ]
