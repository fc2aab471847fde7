"""PPO on one screen: act, judge, assign credit, learn, publish, keep. Every rank runs this same loop; ranks differ inside the parts."""

from functools import partial

from megarl.checkpoint.train_state import TrainState
from megarl.config import PpoRun
from megarl.metrics import Metric, StepMetrics, describe, describe_rewards
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.ppo.credit import assign_credit, observe_rewards
from megarl.ppo.kl import next_kl_coef
from megarl.ppo.minibatches import minibatches
from megarl.ppo.parts import Parts


def train(run: PpoRun, layout: ParallelLayout, parts: Parts) -> TrainState:
    """Train until `run.ppo.total_steps`, from the newest checkpoint if there is one. Called by every rank; returns the last state."""
    data_group = groups.group(layout, "dp")
    state = parts.checkpoints.restore_or_start(parts.checkpointables, TrainState(kl_coef=run.ppo.kl.coef))
    with parts.memory.publishing():
        parts.weight_sync.push(parts.actor, version=state.policy_version)
    parts.parity.at_start(state)
    parts.log.start(state.step)
    baseline = parts.evaluator.at_start(state)
    parts.log.write(state.step, baseline.metrics, *baseline.samples)
    while state.step < run.ppo.total_steps and not parts.checkpoints.is_draining:
        metrics = StepMetrics()
        # act and judge: responses of the current policy, and what they earned
        harvest = parts.harvester.gather(state, parts.judge, metrics)
        # look back: what every model says about the same tokens
        with parts.memory.scoring(), metrics.time("score"):
            rollout = parts.judge.pack(harvest.trajectories, harvest.places, state.policy_version)
            old_logprobs = parts.actor.logprobs(rollout)
            metrics += parts.parity.check(rollout, old_logprobs)
            ref_logprobs = parts.reference.logprobs(rollout, old_logprobs)
            values = parts.critic.values(rollout)
        # credit: rewards become advantages and returns
        rewards_seen = observe_rewards(state.rewards_seen, rollout, run.ppo, layout)
        experience = assign_credit(rollout, old_logprobs, ref_logprobs, values, run.ppo, state.kl_coef, layout, rewards_seen)
        # learn: several passes over the same experience; the critic alone at first
        is_policy_updated = state.step >= run.ppo.critic_warmup_steps
        with parts.memory.learning(), metrics.time("learn"):
            for minibatch in minibatches(experience, run.ppo, run.seed, state.step, layout, parts.actor.learner.packing):
                metrics += parts.critic.update(minibatch)
                if is_policy_updated:
                    metrics += parts.actor.update(minibatch, state.kl_coef)
        parts.reference.refresh(state.step + 1)
        # publish: the sampler gets the new policy before the next step
        with parts.memory.publishing(), metrics.time("publish"):
            parts.weight_sync.push(parts.actor, version=state.policy_version + is_policy_updated)
        # keep: one reduction makes the step's numbers the same on all ranks
        metrics += describe(experience, parts.reference.estimator, state.kl_coef, run.critic is not None) + describe_rewards(
            harvest.trajectories
        )
        report = metrics.reduced(partial(collectives.gather_json, group=data_group))
        observed_kl = report.get("kl/token_mean", Metric(0.0)).value
        kl_coef = next_kl_coef(state.kl_coef, observed_kl, len(rollout) * layout.data, run.ppo.kl)
        state = state.advance(harvest.num_prompts, kl_coef, is_policy_updated, rewards_seen)
        evaluation = parts.evaluator.after_step(state)
        report += evaluation.metrics
        parts.log.write(state.step, report, parts.judge.samples(harvest.trajectories, run.log.samples), *evaluation.samples)
        if parts.checkpoints.due(state, report):
            with parts.memory.saving():
                parts.checkpoints.save(state, parts.checkpointables, report)
    return state
