"""Do the parts of an online algorithm go together? Rules over several keys of `ppo`, each fault naming the keys to change."""

from collections.abc import Iterator

from megarl.config import PpoRun
from megarl.config_file import Fault
from megarl.ppo.algorithms import ADVANTAGES


def algorithm_faults(run: PpoRun) -> list[Fault]:
    """What an estimator, the KL, a correction or a moving average lacks or has no use for."""
    return [*_kl(run), *_correction(run), *_algorithm(run), *_average(run)]


def _kl(run: PpoRun) -> Iterator[Fault]:
    """The adaptive controller multiplies: from 0 it never moves, and a factor below 0 would reward leaving the reference."""
    kl, sequences = run.ppo.kl, run.rollout.prompts_per_step * run.rollout.samples_per_prompt
    if kl.target is None:
        return
    if kl.coef == 0:
        yield Fault(("ppo.kl.coef", "ppo.kl.target"), "ppo.kl.coef: found 0 with ppo.kl.target; expected more than 0: 0 never adapts")
    if 5 * kl.horizon <= sequences:
        text = f"ppo.kl.horizon: found {kl.horizon}; expected more than {sequences // 5}, a fifth of the {sequences} sequences a step"
        yield Fault(("ppo.kl.horizon", "ppo.kl.target", "rollout.prompts_per_step"), text)


def _correction(run: PpoRun) -> Iterator[Fault]:
    correction, knob = run.ppo.correction, "ppo.correction"
    if correction.kind == "mask" and correction.low >= correction.high:
        text = f"found {correction.low:g} with {knob}.high {correction.high:g}; expected less: every weight would be 0"
        yield Fault((f"{knob}.low", f"{knob}.high"), f"{knob}.low: {text}")


def _algorithm(run: PpoRun) -> Iterator[Fault]:
    """What an advantage estimator needs and has no use for, and which parts of a loss go together."""
    ppo, samples, knob = run.ppo, run.rollout.samples_per_prompt, "ppo.advantage"
    needs = ADVANTAGES[ppo.advantage]
    if needs.critic and run.critic is None:
        without = ", ".join(name for name, other in ADVANTAGES.items() if not other.critic)
        yield Fault(("critic", knob), f"critic: missing; ppo.advantage {ppo.advantage} needs one: give critic.path, or choose {without}")
    if not needs.critic and run.critic is not None:
        text = f"critic: found {run.critic.path} with ppo.advantage {ppo.advantage}; expected critic: null, as nothing would use its values"
        yield Fault(("critic", knob), text)
    if not needs.critic and ppo.critic_warmup_steps:
        text = f"found {ppo.critic_warmup_steps} with ppo.advantage {ppo.advantage}; expected 0: there is no critic to warm up"
        yield Fault(("ppo.critic_warmup_steps", knob), f"ppo.critic_warmup_steps: {text}")
    if needs.group and samples == 1:
        text = f"found 1 with ppo.advantage {ppo.advantage}; expected at least 2: responses are compared with others to the same prompt"
        yield Fault(("rollout.samples_per_prompt", knob), f"rollout.samples_per_prompt: {text}")
    if ppo.bootstrap_truncated and ppo.advantage != "gae":
        text = f"ppo.bootstrap_truncated: found true with ppo.advantage {ppo.advantage}; expected false: it is a part of gae"
        yield Fault(("ppo.bootstrap_truncated", knob), text)
    if ppo.dual_clip is not None and ppo.loss != "clip":
        text = f"ppo.dual_clip: found {ppo.dual_clip:g} with ppo.loss {ppo.loss}; expected null: it is a part of the loss clip"
        yield Fault(("ppo.dual_clip", "ppo.loss"), text)


def _average(run: PpoRun) -> Iterator[Fault]:
    """Who wants a moving average needs one, and who refreshes a reference needs one to refresh."""
    refresh, kl = run.ppo.reference_refresh, run.ppo.kl
    wanted = {
        "eval.ema": run.eval is not None and run.eval.ema,
        "ppo.reference_refresh.source": refresh is not None and refresh.source == "ema",
    }
    for knob in (knob for knob, is_wanted in wanted.items() if is_wanted and run.ppo.ema is None):
        found = "true" if knob == "eval.ema" else "ema"
        yield Fault((knob, "ppo.ema"), f"{knob}: found {found} without ppo.ema; expected ppo.ema (such as {{decay: 0.992}}) beside it")
    if refresh is not None and run.reference is None and kl.coef == 0 and kl.target is None:
        text = (
            f"ppo.reference_refresh: found every_steps {refresh.every_steps} with ppo.kl.coef 0; expected null: nothing asks the reference"
        )
        yield Fault(("ppo.reference_refresh", "ppo.kl.coef"), text)
