"""Both supervised lessons on real ranks: they learn, the layout does not show, and a user's mistake stops all ranks before training."""

import json
from pathlib import Path

import pytest

from megarl.errors import MegarlError
from tests.course.lesson_files import read_metrics, reward_run, sft_run, write_files
from tests.ranks import run_ranks

TP2 = {"tensor": 2, "sequence": True, "microbatch_size": 3}
PP2 = {"pipeline": 2, "microbatch_size": 5, "logits_bytes": 1000}
DP2 = {"microbatch_size": 4}
PACKED = {"max_tokens_per_microbatch": 40}


def teach_both(rank: int, world_size: int, root: Path) -> dict:
    from megarl.course.reward_model import train_reward
    from megarl.course.sft import train_sft
    from megarl.parallel import groups

    for name, parallel in (("tp2", TP2), ("pp2", PP2), ("dp2", DP2), ("packed", PACKED)):
        run = sft_run(root, f"sft-{name}", 12, parallel=parallel)
        train_sft(run, groups.initialize(run.parallel, run.seed))
        model = {"path": root / "sft-tp2", "optimizer": {"lr": 3e-3}}
        run = reward_run(root, f"reward-{name}", 12, parallel=parallel, model=model)
        state = train_reward(run, groups.initialize(run.parallel, run.seed))
    return state.to_json()


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    root = write_files(tmp_path_factory.mktemp("course"))
    return root, run_ranks(teach_both, 2, root)


def test_they_finish(course):
    root, states = course
    assert states[0] == states[1] == {"step": 12, "policy_version": 12, "prompts_consumed": 192, "kl_coef": 0.0}
    assert (root / "sft-dp2" / "checkpoints" / "latest").read_text() == "step-00000012\n"
    manifest = json.loads((root / "reward-pp2" / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert list(manifest["models"]) == ["reward"] and manifest["models"]["reward"]["shapes"]["score.weight"] == [1, 32]


def test_they_learn(course):
    root, _ = course
    sft = read_metrics(root, "sft-tp2")
    assert sorted(sft) == list(range(13)) and [step for step in sft if "eval/loss" in sft[step]] == [0, 4, 8, 12]
    assert sft[12]["loss"] < 0.8 * sft[1]["loss"] and sft[12]["eval/loss"] < 0.8 * sft[0]["eval/loss"]
    reward = read_metrics(root, "reward-tp2")
    assert reward[0]["eval/loss"] == pytest.approx(0.693, abs=0.1)
    assert reward[12]["loss"] < reward[1]["loss"] and reward[12]["eval/pair_accuracy"] > 0.6


@pytest.mark.parametrize("lesson", ["sft", "reward"])
def test_the_layout_does_not_show(course, lesson):
    root, _ = course
    expected = read_metrics(root, f"{lesson}-dp2")
    for layout in ("tp2", "pp2", "packed"):
        found = read_metrics(root, f"{lesson}-{layout}")
        assert found.keys() == expected.keys()
        for step in expected:
            assert found[step] == pytest.approx(expected[step], rel=2e-3, abs=2e-4), (layout, step)


def mistakes(rank: int, world_size: int, root: Path) -> list[str]:
    from megarl.course.reward_model import train_reward
    from megarl.course.sft import train_sft
    from megarl.parallel import groups

    def told(train, run) -> str:
        layout = groups.initialize(run.parallel, run.seed)
        try:
            train(run, layout)
        except MegarlError as error:
            return f"{type(error).__name__}: {error}"
        return "trained"

    def data(name: str) -> dict:
        return {"path": root / name, "max_tokens": 16}

    # A mistake that only rank 1 can see: its tokenizer is not there.
    lost = sft_run(root, "e", 2, tokenizer=root / ("sp.model" if rank == 0 else "lost.model"))
    return [
        told(train_sft, sft_run(root, "a", 2, data=data("broken.jsonl"))),
        told(train_sft, sft_run(root, "b", 2, data=data("long.jsonl"))),
        told(train_reward, reward_run(root, "c", 2, data=data("train.jsonl"), model={"path": root / "small", "random_init": True})),
        told(train_reward, reward_run(root, "d", 2, data=data("train.jsonl"), model={"path": root / "nowhere"})),
        told(train_sft, lost),
    ]


def test_mistakes_are_told_on_every_rank_before_training(tmp_path):
    root = write_files(tmp_path)
    (root / "broken.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n{"prompt": 3}\n')
    (root / "long.jsonl").write_text(json.dumps({"prompt": "1+1=" * 9, "response": "2"}) + "\n")
    write_files(tmp_path / "other", vocab_size=8)
    (tmp_path / "other" / "shape").rename(root / "small")
    results = run_ranks(mistakes, 2, root)
    assert results[0] == results[1]
    broken, overlong, vocabulary, nowhere, lost = results[0]
    assert broken.startswith("DataError") and "broken.jsonl" in broken and "2" in broken
    assert overlong.startswith("DataError") and "max_tokens" in overlong
    assert vocabulary.startswith("DataError") and "model.path" in vocabulary
    assert nowhere.startswith("CheckpointError") and "nowhere does not exist" in nowhere
    assert lost.startswith("DataError") and "lost.model" in lost and "rank 1" in lost
    assert not list(root.glob("*/checkpoints"))
