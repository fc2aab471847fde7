"""An experience in numbers: rewards, KL, lengths, credit and the critic's fit.

Axis letters: B sequences of one data-parallel replica, T tokens of the padded batch.
"""

from collections.abc import Sequence

from torch import Tensor

from megarl.metrics.values import Deviation, ExplainedVariance, Largest, Metric, Metrics, Total, mean_of
from megarl.ppo.kl import Estimator, kl_estimate, kl_of_sequences
from megarl.records import Experience, Trajectory


def describe(experience: Experience, kl_estimator: Estimator | None, kl_coef: float, has_critic: bool = True) -> Metrics:
    """This rank's share of the step's metrics; nothing is communicated.

    `kl/token_mean` (response-token mean of each sequence, then mean over sequences) is what the adaptive controller watches;
    `kl/sequence_sum` is what targets published for trlx refer to (semantics section 1). With `kl_estimator` None, a run without a
    reference, nothing is said about KL, and nothing about values and returns without a critic. `kl_coef` is the coefficient this step used.
    """
    mask = experience.response_mask
    lengths = mask.sum(1)
    values, returns, advantages = (t[mask] for t in (experience.values, experience.returns, experience.advantages))
    return Metrics(
        {
            "reward/mean": mean_of(experience.rewards),
            "reward/std": Deviation.of(experience.rewards),
            **({} if kl_estimator is None else _kl(experience, kl_estimator, kl_coef)),
            "response/length": mean_of(lengths),
            "response/longest": Largest(lengths.max()),
            "response/truncated_share": mean_of(experience.truncated),
            "response/tokens": Total(lengths.sum()),
            **_mean_and_std("advantage", advantages),
            **(_fit(values, returns) if has_critic else {}),
        }
    )


def describe_rewards(trajectories: Sequence[Trajectory]) -> Metrics:
    """The mean of every part of the reward, before weights: `reward/<part>`, and that of greedy responses where there are such."""
    total = Metrics()
    for trajectory in trajectories:
        if trajectory.greedy is not None:
            total = total + Metrics({"reward/greedy": Metric(trajectory.greedy.reward)})
        total = total + Metrics({f"reward/{name}": Metric(float(part)) for name, part in trajectory.reward_parts.items()})
    return total


def _kl(experience: Experience, estimator: Estimator, kl_coef: float) -> dict[str, Metric]:
    mask = experience.response_mask
    kl = kl_estimate(experience.old_logprobs, experience.ref_logprobs, mask, estimator)
    return {
        "kl/token_mean": mean_of(kl_of_sequences(kl, mask)),
        "kl/sequence_sum": mean_of(kl.sum(1)),
        "kl/coef": Metric(kl_coef),
    }


def _fit(values: Tensor, returns: Tensor) -> dict[str, Metric | Deviation | ExplainedVariance]:
    return {
        **_mean_and_std("return", returns),
        **_mean_and_std("value", values),
        "value/explained_variance": ExplainedVariance.of(values, returns),
    }


def _mean_and_std(name: str, numbers: Tensor) -> dict[str, Metric | Deviation]:
    return {f"{name}/mean": mean_of(numbers), f"{name}/std": Deviation.of(numbers)}
