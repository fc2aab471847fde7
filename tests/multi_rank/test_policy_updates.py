"""Policy and critic updates on two ranks: text that is imitated beside them, updates that are skipped, schedules of their own."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megarl.checkpoint.train_state import TrainState
from megarl.config import LessonData, PtxConfig
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import LearningError
from megarl.models.family import spec_from_hf_config
from megarl.models.learning_rate import lr_at
from megarl.parallel import groups
from megarl.ppo.credit import assign_credit
from megarl.ppo.ptx import NoPtx, Ptx
from megarl.ppo.roles import Actor, Critic, num_updates
from megarl.records import RolloutBatch
from tests.course.lesson_files import write_files
from tests.multi_rank.role_cases import (
    NUM_ROWS,
    Case,
    DictSource,
    assembled,
    hf_config,
    make_experience,
    make_run,
    updated_weights,
    weights,
)
from tests.multi_rank.test_ema import checkpoints_of, share, stored_run
from tests.multi_rank.test_roles_learner import gradient
from tests.ranks import run_all

SPEC = spec_from_hf_config(hf_config())
COEF = 0.5
TRAINING = {"lr": 0.01, "eps": 1e-5, "clip_grad": 0.5}
LAYOUTS = [
    {},
    {"max_tokens_per_microbatch": 32},
    {"pipeline": 2},
    {"pipeline": 2, "head": "last_stage", "max_tokens_per_microbatch": 32},
    {"tensor": 2, "sequence": True},
    {"context": 2, "distributed_optimizer": False},
]


def text_of(root: Path, run, layout) -> Ptx:
    tokenizer = load_tokenizer(root / "sp.model")
    config = PtxConfig(coef=COEF, batch_size=8, data=LessonData(path=root / "train.jsonl", max_tokens=16))
    return Ptx(config, DemonstrationSet(config.data, tokenizer), tokenizer.pad_id, run.parallel.logits_bytes, run.seed, layout)


def idle(experience):
    """Nothing to learn from rewards."""
    return replace(experience, advantages=torch.zeros_like(experience.advantages))


def imitate(rank: int, world_size: int, root: Path, parallel: dict) -> dict:
    """One update from rewards alone, from text alone, and from both."""
    result = {}
    case = Case({"microbatch_size": 2} | parallel, ppo={"entropy_coef": 0.0})
    for name in ("rewards", "text", "both"):
        run = make_run(case)
        layout = groups.initialize(run.parallel, seed=0)
        text = NoPtx() if name == "rewards" else text_of(root, run, layout)
        actor = Actor(SPEC, run, layout, DictSource(weights(SPEC, "actor", 1)), text)
        mine = share(layout)
        metrics = actor.update(idle(mine) if name == "text" else mine)
        assert ("actor/ptx_loss" in metrics) == (name != "rewards")
        result[name] = {"actor_weights": updated_weights(actor.pieces), "metrics": metrics.to_json(), "dp_rank": layout.dp_rank}
    return result


def positions(rank: int, world_size: int, root: Path) -> list[list]:
    """Which rows are imitated in steps 0 to 12: asked in order, and by somebody who starts at each of them."""
    run = make_run(Case())
    layout = groups.initialize(run.parallel, seed=0)
    going = text_of(root, run, layout)
    straight = [going.passes(step, None)[0].batch.token_ids.tolist() for step in range(13)]
    started = [text_of(root, run, layout).passes(step, None)[0].batch.token_ids.tolist() for step in range(13)]
    assert straight == started and len({json.dumps(rows) for rows in straight}) > 6
    actor = Actor(SPEC, run, layout, DictSource(weights(SPEC, "actor", 1)), going)
    asked, original = [], going.passes
    going.passes = lambda step, packing: asked.append(step) or original(step, packing)
    actor.learner.load_counts({"num_steps": 5, "num_updates": 4})
    actor.update(share(layout))
    actor.update(share(layout))
    assert asked == [5, 6]  # the position comes back with the learner's counts
    return straight


def everything(role) -> list[torch.Tensor]:
    slots = role.learner.optimizer_pieces(role.pieces)
    return [piece.view.clone() for pieces in (role.pieces, *slots.values()) for piece in pieces]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def skip(rank: int, world_size: int, root: Path, precision: str) -> dict:
    """A reward that is no number on one rank: policy and critic stay bit for bit on both, say so, stop after the second in a row."""
    case = Case({}, ppo={"ema": {}}, optimizer=TRAINING | {"max_skipped_updates": 2}, precision=precision)
    run = stored_run(root, f"skipping-{precision}", case)
    layout = groups.initialize(run.parallel, seed=0)
    actor = Actor(SPEC, run, layout, DictSource(weights(SPEC, "actor", 1)))
    critic = Critic(SPEC, run, layout, DictSource(weights(SPEC, "critic", 2)))
    store, kept = checkpoints_of(run, layout), {"actor": actor, "critic": critic}
    store.restore_or_start(kept)
    good = share(layout)
    actor.update(good), critic.update(good)
    store.save(TrainState(step=1), kept)
    store.finish()
    rollout = RolloutBatch(**{f.name: getattr(good, f.name) for f in fields(RolloutBatch)})
    if layout.dp_rank == 1:
        rollout = replace(rollout, rewards=rollout.rewards.index_fill(0, torch.tensor([2]), float("nan")))
    bad = assign_credit(rollout, good.old_logprobs, good.ref_logprobs, good.values, run.ppo, 0.05, layout)
    before = [everything(role) for role in (actor, critic)]
    metrics = actor.update(bad) + critic.update(bad)
    assert all(same(everything(role), held) for role, held in zip((actor, critic), before, strict=True))
    skipped = [metrics[f"{role}/skipped_updates"].value for role in ("actor", "critic")]
    store.save(TrainState(step=2), kept)  # left out: the one before is from before the first skipped update
    store.finish()
    names = sorted(path.name for path in store.directory.glob("step-*"))
    actor.update(good)
    assert not actor.learner.is_skipping and not same(everything(actor), before[0])
    with pytest.raises(LearningError) as caught:
        critic.update(bad)
    assert same(everything(critic), before[1])
    return {"skipped": skipped, "names": names, "said": str(caught.value)}


def infinite_loss(rank: int, world_size: int) -> float:
    """The gradient is a number, the loss is not."""
    run = make_run(Case(optimizer=TRAINING))
    layout = groups.initialize(run.parallel, seed=0)
    critic = Critic(SPEC, run, layout, DictSource(weights(SPEC, "critic", 2)))
    before, batch = everything(critic), share(layout)

    def loss(values, rows):
        total, metrics = critic._loss(torch.tensor(10.0), values, rows)
        return total + (float("inf") if layout.dp_rank == 1 else 0.0), metrics

    metrics = critic.learner.step(batch, critic._head, loss)
    assert same(everything(critic), before)
    return metrics["skipped_updates"].value


def schedules(rank: int, world_size: int) -> dict[str, list[float]]:
    """Learning rates of both over five steps, the first two of them warm-up of the critic alone."""
    run = make_run(Case(ppo={"total_steps": 5, "critic_warmup_steps": 2}))
    optimizers = {
        "actor": {"lr": 0.01, "schedule": "cosine", "warmup_steps": 1},
        "critic": {"lr": 0.03, "schedule": "linear", "warmup_steps": 2, "min_lr_ratio": 0.1},
    }
    for name, optimizer in optimizers.items():
        model = getattr(run, name)
        run = run.model_copy(update={name: model.model_copy(update={"optimizer": model.optimizer.model_copy(update=optimizer)})})
    layout = groups.initialize(run.parallel, seed=0)
    roles = {
        "critic": Critic(SPEC, run, layout, DictSource(weights(SPEC, "critic", 2))),
        "actor": Actor(SPEC, run, layout, DictSource(weights(SPEC, "actor", 1))),
    }
    found: dict[str, list[float]] = {"actor": [], "critic": []}
    for step in range(5):
        for name, role in roles.items():
            if name == "critic" or step >= run.ppo.critic_warmup_steps:
                found[name].append(role.update(share(layout))[f"{name}/lr"].value)
    expected = {
        "actor": [lr_at(run.actor.optimizer, i, num_updates(run, 2)) for i in range(3)],
        "critic": [lr_at(run.critic.optimizer, i, num_updates(run)) for i in range(5)],
    }
    assert found == expected
    assert roles["actor"].learner.counts() == {"num_steps": 3, "num_updates": 3}
    assert roles["critic"].learner.counts() == {"num_steps": 5, "num_updates": 5}
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    place = write_files(tmp_path_factory.mktemp("updates") / "files")
    (place / "model").mkdir()
    return place


@pytest.fixture(scope="module")
def on_two(root) -> list[list]:
    others = [(positions, (root,)), (skip, (root, "fp32")), (skip, (root, "bf16")), (infinite_loss, ()), (schedules, ())]
    return run_all([*((imitate, (root, parallel)) for parallel in LAYOUTS), *others], 2)


def test_text_adds_its_gradient_to_that_of_the_rewards(on_two):
    start = weights(SPEC, "actor", 1)
    rewards, text, both = (
        gradient(assembled([rank[name] for rank in on_two[0]], "actor_weights", Case()), start) for name in ("rewards", "text", "both")
    )
    for name, total in both.items():
        size = total.abs().max()
        assert text[name].abs().max() > 1e-3 * size, name
        assert (total - rewards[name] - text[name]).abs().max() < 1e-4 * size, name


def test_imitation_does_not_depend_on_the_layout(on_two):
    start = weights(SPEC, "actor", 1)
    first = assembled([rank["both"] for rank in on_two[0]], "actor_weights", Case())
    losses = []
    for parallel, ranks in zip(LAYOUTS, on_two, strict=False):
        found = assembled([rank["both"] for rank in ranks], "actor_weights", Case())
        for name, tensor in found.items():
            size = (first[name] - start[name]).abs().max()
            assert (tensor - first[name]).abs().max() < 1e-4 * size, (parallel, name)
        parts = {rank["both"]["dp_rank"]: rank["both"]["metrics"]["actor/ptx_loss"] for rank in ranks}
        losses.append(parts)
    from megarl.metrics import Metrics

    def whole(parts: dict) -> float:
        total = Metrics()
        for part in parts.values():
            total = total + Metrics.from_json({"loss": part})
        return total["loss"].value

    assert all(whole(parts) == pytest.approx(whole(losses[0]), rel=1e-5) for parts in losses)


def test_the_text_continues_where_the_step_says(on_two):
    assert on_two[len(LAYOUTS)][0] != on_two[len(LAYOUTS)][1]  # each data rank has rows of its own


def test_numbers_that_are_none_change_nothing_anywhere(on_two, root):
    for precision, ranks in zip(("fp32", "bf16"), on_two[len(LAYOUTS) + 1 :], strict=False):
        assert [rank["skipped"] for rank in ranks] == [[1.0, 1.0], [0.0, 0.0]]  # counted by the first replica alone
        assert [rank["names"] for rank in ranks] == [["step-00000001"]] * 2
        for rank in ranks:
            assert "critic: the update of optimizer step 2 is skipped: loss nan, gradient norm nan" in rank["said"]
            assert "critic.optimizer.max_skipped_updates=2" in rank["said"] and "newest checkpoint" in rank["said"]
        folder = root / f"skipping-{precision}" / "skipped_updates"
        assert {path.name for path in folder.iterdir()} == {
            f"{role}-update-{step:08d}-data-{data:05d}.jsonl"
            for role, step in (("actor", 1), ("critic", 1), ("critic", 2))
            for data in (0, 1)
        }
        rows = [json.loads(line) for path in sorted(folder.glob("critic-update-00000001-*")) for line in path.read_text().splitlines()]
        experience = make_experience()
        assert [row["sample_id"] for row in rows] == list(range(NUM_ROWS))
        assert [row["token_ids"] for row in rows] == [
            tokens[:length] for tokens, length in zip(experience.token_ids.tolist(), experience.lengths.tolist(), strict=True)
        ]
        assert "rewards" in rows[7]["not_finite"] and "rewards" not in rows[6]["not_finite"]


def test_a_loss_that_is_no_number_is_enough(on_two):
    assert on_two[-2] == [1.0, 0.0]


def test_actor_and_critic_follow_schedules_of_their_own(on_two):
    found = on_two[-1][0]
    assert len(found["actor"]) == 3 and len(found["critic"]) == 5
    assert len(set(found["actor"])) > 1 and len(set(found["critic"])) > 1
