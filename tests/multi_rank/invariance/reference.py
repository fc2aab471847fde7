"""What is computed under every layout: each role's answers, the credit made of them, and what each lesson teaches its model.

One rank, with all sequences in one microbatch, is the reference. Every rank of a layout runs `computed`.

Every learner takes two kinds of steps from the same start. One with a learning rate so large that the weights *are* the gradient:
with Adam's eps at 1 and gradients clipped to norm 1 the first update is lr g / (|g| + 1). Then, weights and optimizer put back, two
steps of an ordinary size. Adam with its small default eps would divide nearly zero gradients by themselves: it turns a rounding error of
a gradient that should be zero into a full step, so it tells nothing about layouts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megarl.config import PpoRun
from megarl.course.reward_model import comparison_loss
from megarl.course.sft import imitation_loss
from megarl.metrics import Metrics
from megarl.models.family import spec_from_hf_config
from megarl.models.learner import Learner
from megarl.models.pieces import load_pieces
from megarl.models.spec import ModelSpec
from megarl.models.token_stats import LogprobHead, PolicyHead, ScoreHead
from megarl.parallel import groups
from megarl.parallel.layout import ParallelLayout
from megarl.ppo.credit import assign_credit
from megarl.ppo.roles import Actor, Critic, Reference, RewardModel, build_frozen, build_learner
from megarl.records import DemonstrationBatch, PreferenceBatch, RolloutBatch
from tests.multi_rank.invariance.layouts import MIXTURES, PREFERENCES, VOCAB, Layout
from tests.multi_rank.invariance.preferences import MAKE_LESSON, examples_for
from tests.multi_rank.role_cases import DictSource, updated_weights, weights

NUM_ROWS, NUM_TOKENS = 8, 13  # eight data ranks have a row each
SEEDS = {"actor": 1, "critic": 2, "reference": 3, "reward model": 4, "sft": 5, "reward": 6} | {
    name: 7 + number for number, name in enumerate(PREFERENCES)
}
ROLES = {name: "critic" if name.startswith(("critic", "reward")) else "actor" for name in SEEDS}
GRADIENT_LR = 1000.0


class EntropyHead(PolicyHead):
    """The entropy alone."""

    def __call__(self, *arguments) -> Tensor:
        return super().__call__(*arguments)[1]

    def of_share(self, *arguments) -> Tensor:
        return super().of_share(*arguments)[1]


@dataclass(frozen=True)
class Given:
    """The whole batch that every layout works on: rollout, noise on what the models say about it, rejected answers."""

    rollout: RolloutBatch
    drift: Tensor  # f32[B, T]
    preferences: PreferenceBatch


def make_given() -> Given:
    """Eight sequences of 4 to 13 tokens. One has no response, one a response of a single token, one was cut."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([13, 8, 5, 9, 12, 4, 7, 10])
    prompts = torch.tensor([3, 2, 5, 4, 1, 3, 3, 6])
    position = torch.arange(NUM_TOKENS)[None]
    mask = (position >= prompts[:, None]) & (position < lengths[:, None])
    tokens = torch.randint(1, VOCAB, mask.shape, generator=generator).masked_fill(position >= lengths[:, None], 0)
    drift = torch.where(mask, 0.3 * torch.randn(mask.shape, generator=generator), 0.0)
    rollout = RolloutBatch(
        token_ids=tokens,
        lengths=lengths,
        response_mask=mask,
        rollout_logprobs=torch.where(mask, -4.6, 0.0),
        rewards=torch.randn(NUM_ROWS, generator=generator),
        truncated=torch.arange(NUM_ROWS) == 4,
        group_ids=torch.arange(NUM_ROWS),
        sample_ids=torch.arange(NUM_ROWS),
        baselines=torch.zeros(NUM_ROWS),
        baseline_truncated=torch.zeros(NUM_ROWS, dtype=torch.bool),
        ages=torch.zeros_like(tokens),
        must_go_on=torch.zeros_like(mask),
    )
    rejected = torch.arange(NUM_ROWS).roll(3)
    return Given(rollout, drift, PreferenceBatch(tokens, lengths, tokens[rejected], lengths[rejected], torch.zeros(NUM_ROWS)))


def make_run(layout: Layout) -> PpoRun:
    optimizer = {"lr": 1.0, "eps": 1.0, "clip_grad": 1.0, "router_balance": 0.02 if layout.family in MIXTURES else 0.0}
    model = {"path": "model", "optimizer": optimizer}
    return PpoRun.model_validate(
        {
            "output_dir": "out",
            "tokenizer": "tokenizer",
            "precision": "fp32",
            "parallel": {"microbatch_size": 4 * NUM_ROWS} | layout.parallel,  # a pair is two sequences, a list up to four
            "actor": model,
            "critic": model,
            "rewards": [{"kind": "exact"}],
            "data": {"path": "prompts.jsonl"},
            "rollout": {"prompts_per_step": NUM_ROWS, "max_response_tokens": 11, "temperature": 0.7},
            "ppo": {"total_steps": 10, "minibatch_size": NUM_ROWS, "entropy_coef": 0.05, "dual_clip": 3.0} | layout.ppo,
        }
    )


def computed(case: Layout) -> dict:
    """Everything, as this rank holds it: rows of its replica, its own pieces of gradients and weights. Called by every rank."""
    run = make_run(case)
    layout = groups.initialize(run.parallel, seed=0)
    spec = spec_from_hf_config(case.hf_config)
    source = {name: DictSource(weights(spec, ROLES[name], seed)) for name, seed in SEEDS.items()}
    given, share = make_given(), NUM_ROWS // layout.data
    mine = slice(layout.dp_rank * share, (layout.dp_rank + 1) * share)
    rollout, drift = given.rollout.rows(mine), given.drift[mine]

    actor, critic = Actor(spec, run, layout, source["actor"]), Critic(spec, run, layout, source["critic"])
    entropy_head = EntropyHead(run.parallel.logits_bytes, run.rollout.temperature, "response_mask")
    answers = {
        "log-probs": actor.logprobs(rollout),
        "reference log-probs": Reference(spec, run, layout, source["reference"]).logprobs(rollout),
        "entropy": actor.learner.forward(rollout, entropy_head),
        "values": critic.values(rollout),
        "scores": RewardModel(spec, run, layout, source["reward model"]).scores(rollout),
    }
    old, ref = answers["log-probs"] + drift, answers["reference log-probs"]
    experience = assign_credit(rollout, old, ref, answers["values"] + drift, run.ppo, 0.05, layout)
    answers |= {"advantages": experience.advantages, "returns": experience.returns}
    students = {
        "actor": (actor.learner, actor.pieces, lambda: actor.update(experience)),
        "critic": (critic.learner, critic.pieces, lambda: critic.update(experience)),
    }
    for name in case.learners:
        if name not in students:
            students[name] = lesson_student(name, given, mine, spec, run, layout, source)
    learned = {name: taught(*students[name], source[name]) for name in case.learners}
    return {"dp_rank": layout.dp_rank, "answers": answers, "learned": learned}


def lesson_student(
    name: str, given: Given, mine: slice, spec: ModelSpec, run: PpoRun, layout: ParallelLayout, source: dict[str, DictSource]
) -> tuple[Learner, list, Callable[[], Metrics]]:
    """The model that learns in a lesson, its pieces, and a step of it on this replica's rows `mine`. Called by every rank."""
    learner, pieces = build_learner(spec, ROLES[name], run.actor, run, layout, source[name], total_steps=10)
    if name == "sft":
        rollout = given.rollout.rows(mine)
        batch = DemonstrationBatch(rollout.token_ids, rollout.lengths, rollout.response_mask)
        head, denominator = LogprobHead(run.parallel.logits_bytes, mask_field="loss_mask"), float(given.rollout.response_mask.sum())
        loss = partial(imitation_loss, denominator=denominator)
    elif name == "reward":
        batch, head, loss = given.preferences.rows(mine), ScoreHead(), partial(comparison_loss, denominator=float(NUM_ROWS))
    else:
        lesson = MAKE_LESSON[name](run, lambda: build_frozen(spec, "actor", run, layout, source["reference"])[0])
        batch = lesson.collate(examples_for(name, NUM_ROWS)[mine])
        head, loss = lesson.head, lesson.loss_function(float(NUM_ROWS))
    return learner, pieces, lambda: learner.step(batch, head, loss)


def taught(learner: Learner, pieces: list, step: Callable[[], Metrics], source: DictSource) -> dict:
    """The metrics of a step and its gradient; then, from the same start again, the weights after two steps and the second's metrics."""
    optimizer = [(piece.view, piece.view.clone()) for held in learner.optimizer_pieces(pieces).values() for piece in held]
    counts, settings = learner.counts(), learner.config
    learner.config = settings.model_copy(update={"lr": GRADIENT_LR})
    first = step().to_json()
    gradient = updated_weights(pieces)
    load_pieces(pieces, source)
    learner.refresh_main_params()
    for view, before in optimizer:
        view.copy_(before)
    learner.load_counts(counts)
    learner.config = settings
    step()
    return {"first": first, "gradient": gradient, "second": step().to_json(), "weights": updated_weights(pieces)}


def computed_for(rank: int, world_size: int, layouts: list[Layout]) -> list[dict]:
    """For `run_ranks`: several layouts in one group of ranks."""
    results = []
    for layout in layouts:
        try:
            results.append(computed(layout))
        except Exception as error:
            raise AssertionError(f"{layout}: {error}") from error
    return results
