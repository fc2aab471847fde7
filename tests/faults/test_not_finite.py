"""R16: a number that is none, on one rank, skips the update on all of them alike; several in a row stop the run where it was before.

The hook's `nan` spoils one activation of one rank's next forward pass: loss and gradients of that rank are no numbers then.
"""

import json

import pytest

from tests.course.lesson_files import settings, write_files
from tests.faults.started import PATIENT, QUICK, last_hashes, once, ppo_config, started, write_config

STEPS, EVERY, MOST = 8, 2, 3


class Spoiled:
    """Lessons of `STEPS` steps, spoiled in the learning of some of them."""

    def __init__(self, root):
        self.root = write_files(root)

    def run(self, name, *faults, steps=STEPS, script="torchrun", expected=0):
        """The run's folder and everything it said."""
        keys = settings(self.root, name, STEPS, checkpoint={"every_steps": EVERY, "background": "off"})
        keys["model"]["optimizer"] |= {"max_skipped_updates": MOST, "schedule": "constant"}
        keys["train"] |= {"total_steps": steps, "eval_every_steps": 0}
        config, marker = write_config(self.root / f"{name}.yaml", keys), self.root / f"{name}.struck"
        faults = once(marker, *(f"learn:{fault}:nan" for fault in faults)) if faults else {}
        with started("sft", config, self.root / name, 2, script, **QUICK | faults) as run:
            assert run.wait(150) == expected, run.text()
        return run


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    return Spoiled(tmp_path_factory.mktemp("spoiled"))


def weights(hashes):
    return {name: one for name, one in hashes.items() if name.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_rank_is_enough_and_the_ranks_stay_alike(lessons):
    """Spoiled on rank 0 or on rank 1, the run ends with the same bytes: nobody made the update alone."""
    runs = [lessons.run(f"rank-{rank}", f"{rank}:5") for rank in (0, 1)]
    for run in runs:
        assert "the update of optimizer step 4 is skipped: loss nan" in run.text()
        assert {line["step"]: line["skipped_updates"] for line in run.metrics() if line["step"]} == {
            step: float(step == 5) for step in range(1, STEPS + 1)
        }
        files = sorted(path.name for path in (run.run / "skipped_updates").iterdir())
        assert files == [f"model-update-00000004-data-{data:05d}.jsonl" for data in (0, 1)]
        rows = [json.loads(line) for name in files for line in (run.run / "skipped_updates" / name).read_text().splitlines()]
        assert len(rows) == 16 and all(row["token_ids"] for row in rows)
    first, second = (last_hashes(run.run) for run in runs)
    assert first == second and weights(first) != weights(last_hashes(lessons.run("peace").run))
    print(f"R16: nan on one of 2 ranks: skipped on both, dumped ({', '.join(files)}), the same bytes whichever rank had it")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_skipped_update_leaves_the_weights_as_they_were(lessons):
    run = lessons.run("last", "1:5", steps=5)
    manifests = {path.parent.name: json.loads(path.read_text()) for path in (run.run / "checkpoints").glob("step-*/manifest.json")}
    before, after = (manifests[f"step-{step:08d}"] for step in (4, 5))
    assert weights(before["files"]) and weights(before["files"]) == weights(after["files"])
    assert [one["models"]["actor"]["counts"] for one in (before, after)] == [
        {"num_steps": 4, "num_updates": 4},
        {"num_steps": 5, "num_updates": 4},
    ]
    print(f"R16: {len(weights(before['files']))} files of weights and moments before and after a skipped update: equal")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_several_in_a_row_stop_the_run_before_the_first_of_them(lessons):
    """The attempt loop then starts again from there; without the fault it ends as in peace."""
    peace = lessons.run("in-peace")
    run = lessons.run("stopped", "1:5", "0:6", "1:7", script="attempts")
    (why,) = [event["reason"] for event in run.events("outcome") if event["outcome"] == "retry"]
    assert "LearningError" in why and f"max_skipped_updates={MOST}" in why and "so were the 2 before it" in why
    assert "step-00000006 is left out: updates of actor are being skipped" in run.text()
    assert [event["step"] for event in run.events("continue")] == [0, 4]
    assert last_hashes(run.run) == last_hashes(peace.run)
    print(f"R16: {MOST} in a row: stopped, continued at step 4, ended with the bytes of a run in peace")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_critic_and_actor_of_ppo(tmp_path):
    """The first forward pass of a step's learning is the critic's: it skips on both ranks, the actor learns on."""
    config, output = ppo_config(tmp_path, "spoiled", 4)
    with started("ppo", config, output, 2, **PATIENT | once(tmp_path / "struck", "learn:1:3:nan")) as run:
        assert run.wait(400) == 0, run.text()
    skipped = {line["step"]: (line["critic/skipped_updates"], line["actor/skipped_updates"]) for line in run.metrics() if line["step"]}
    assert skipped[3][0] > 0 and skipped[3][1] == 0 and not any(any(pair) for step, pair in skipped.items() if step != 3), skipped
    assert "critic: the update of optimizer step" in run.text() and list((output / "skipped_updates").glob("critic-*"))
    print(f"R16: PPO, nan in step 3 on rank 1: {skipped}")
