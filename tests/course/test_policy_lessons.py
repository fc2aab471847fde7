"""DPO, IPO, RRHF and the reward model over tokens on real ranks: they learn, and neither layout nor packing shows."""

import json
import math
from pathlib import Path

import pytest

from tests.course.lesson_files import dpo_run, read_metrics, reward_run, rrhf_run, write_files
from tests.ranks import run_ranks

STEPS = 6
LAYOUTS = {
    "dp2": {"microbatch_size": 4},
    "tp2": {"tensor": 2, "sequence": True, "microbatch_size": 6},
    "pp2": {"pipeline": 2, "microbatch_size": 8, "logits_bytes": 1000},
    "last": {"pipeline": 2, "microbatch_size": 8, "head": "last_stage"},
    "packed": {"max_tokens_per_microbatch": 64},
    "packed-pp2": {"pipeline": 2, "max_tokens_per_microbatch": 64},
}
FOUR = {
    "tp2pp2": {"tensor": 2, "pipeline": 2, "sequence": True, "microbatch_size": 8},
    "pp2dp2-packed": {"pipeline": 2, "max_tokens_per_microbatch": 64},
    "cp2pp2-packed": {"context": 2, "pipeline": 2, "max_tokens_per_microbatch": 64},
}


def teach_all(rank: int, world_size: int, root: Path, layouts: dict[str, dict]) -> list[dict]:
    from megarl.course.dpo import train_dpo
    from megarl.course.reward_model import train_reward
    from megarl.course.rrhf import train_rrhf
    from megarl.parallel import groups

    states = []
    for name, parallel in layouts.items():
        smoothed, over_tokens = {"beta": 0.5, "label_smoothing": 0.1}, {"form": "tokens", "centring_coef": 0.01}
        sharded = {"head": "sharded"} if "pipeline" in parallel and "head" not in parallel else {}
        for train, run in (
            (train_dpo, dpo_run(root, f"dpo-{name}", STEPS, parallel=parallel, dpo=smoothed)),
            (train_dpo, dpo_run(root, f"ipo-{name}", STEPS, parallel=parallel, dpo={"loss": "ipo", "beta": 0.5})),
            (train_rrhf, rrhf_run(root, f"rrhf-{name}", STEPS, parallel=parallel)),
            (train_reward, reward_run(root, f"tokens-{name}", STEPS, parallel=parallel | sharded, comparison=over_tokens)),
        ):
            states.append(train(run, groups.initialize(run.parallel, run.seed)).to_json())
    return states


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    root = write_files(tmp_path_factory.mktemp("course"))
    run_ranks(teach_all, 2, root, LAYOUTS, timeout_s=580)
    return root


LESSONS = ("dpo", "ipo", "rrhf", "tokens")


@pytest.mark.slow
@pytest.mark.timeout(600)  # the first one teaches them all
@pytest.mark.parametrize("lesson", LESSONS)
def test_the_layout_does_not_show(course, lesson):
    expected = read_metrics(course, f"{lesson}-dp2")
    for layout in LAYOUTS:
        found = read_metrics(course, f"{lesson}-{layout}")
        assert found.keys() == expected.keys()
        for step in expected:
            assert found[step] == pytest.approx(expected[step], rel=2e-3, abs=2e-4), (layout, step)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lesson", LESSONS)
def test_they_learn(course, lesson):
    metrics = read_metrics(course, f"{lesson}-dp2")
    assert metrics[STEPS]["eval/loss"] < metrics[0]["eval/loss"]
    assert metrics[STEPS]["eval/pair_accuracy"] > metrics[0]["eval/pair_accuracy"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_ranks_do_not_show_either(course):
    run_ranks(teach_all, 4, course, FOUR, timeout_s=590)
    for lesson in LESSONS:
        expected = read_metrics(course, f"{lesson}-dp2")
        for layout in FOUR:
            found = read_metrics(course, f"{lesson}-{layout}")
            for step in expected:
                assert found[step] == pytest.approx(expected[step], rel=2e-3, abs=2e-4), (lesson, layout, step)


def resume_both(rank: int, world_size: int, root: Path) -> None:
    from megarl.course.dpo import train_dpo
    from megarl.parallel import groups

    schedule = {"path": root / "shape", "random_init": True, "optimizer": {"lr": 1e-2}}  # one that does not know where the run ends
    for output, steps in (("whole", 4), ("halved", 2), ("halved", 4)):
        run = dpo_run(root, output, steps, model=schedule)
        train_dpo(run, groups.initialize(run.parallel, run.seed))


def test_a_policy_starts_as_its_reference_and_a_resumed_run_still_compares_with_it(tmp_path):
    root = write_files(tmp_path)
    run_ranks(resume_both, 1, root)
    whole, halved = read_metrics(root, "whole"), read_metrics(root, "halved")
    assert halved[4] == whole[4] and halved[4]["margin"] != 0.0
    start = whole[0]
    assert start["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert start["eval/reward_chosen"] == start["eval/reward_rejected"] == start["eval/margin"] == 0.0
    manifest = json.loads((root / "whole" / "checkpoints" / "step-00000004" / "manifest.json").read_text())
    assert list(manifest["models"]) == ["actor"]


def wrong_files(rank: int, world_size: int, root: Path) -> list[str]:
    from megarl.course.reward_model import train_reward
    from megarl.course.rrhf import train_rrhf
    from megarl.errors import DataError
    from megarl.parallel import groups

    told = []
    for train, run in (
        (train_rrhf, rrhf_run(root, "a", 2, rrhf={"max_responses": 3})),
        (train_reward, reward_run(root, "b", 2, comparison={"margin": True})),
    ):
        layout = groups.initialize(run.parallel, run.seed)
        with pytest.raises(DataError) as error:
            train(run, layout)
        told.append(str(error.value))
    return told


def test_what_a_file_lacks_is_told_before_training(tmp_path):
    root = write_files(tmp_path)
    ((too_long, no_margin),) = run_ranks(wrong_files, 1, root)
    assert "lists.jsonl" in too_long and "rrhf.max_responses=3" in too_long and "4" in too_long
    assert "train.jsonl" in no_margin and "comparison.margin" in no_margin
