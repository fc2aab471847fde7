"""Which algorithm a run may name: what an estimator needs is there, what it has no use for is not; `--check` counts without a critic."""

import pytest

from megarl import cli
from megarl.ppo.algorithms import ADVANTAGES
from tests.unit.tiny_run import write_run

CASES = {
    "a critic for nothing": (
        ["ppo.advantage=grpo"],
        ["critic: found ROOT/critic with ppo.advantage grpo; expected critic: null, as nothing would use its values"],
    ),
    "no critic": (
        ["critic=null"],
        [
            "critic: missing; ppo.advantage gae needs one: give critic.path, or choose rloo, grpo, dr_grpo, remax,"
            " reinforce_pp, reinforce_pp_baseline"
        ],
    ),
    "a group of one": (
        ["ppo.advantage=rloo", "critic=null", "rollout.samples_per_prompt=1", "ppo.minibatch_size=4"],
        [
            "rollout.samples_per_prompt: found 1 with ppo.advantage rloo; expected at least 2: responses are compared with others to"
            " the same prompt"
        ],
    ),
    "nobody to warm up, nothing to go on from": (
        ["ppo.advantage=reinforce_pp", "critic=null", "ppo.critic_warmup_steps=2", "ppo.bootstrap_truncated=true"],
        [
            "ppo.critic_warmup_steps: found 2 with ppo.advantage reinforce_pp; expected 0: there is no critic to warm up",
            "ppo.bootstrap_truncated: found true with ppo.advantage reinforce_pp; expected false: it is a part of gae",
        ],
    ),
    "a clip of another loss": (
        ["ppo.loss=cispo", "ppo.dual_clip=3"],
        ["ppo.dual_clip: found 3 with ppo.loss cispo; expected null: it is a part of the loss clip"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_go_together_is_refused(tmp_path, capsys, name):
    overrides, expected = CASES[name]
    assert cli.run(["ppo", str(write_run(tmp_path)), *overrides, "--check"]) == 78
    lines = capsys.readouterr().err.replace(str(tmp_path), "ROOT").splitlines()
    assert [line.split(": ", 3)[3] for line in lines] == expected  # behind "megarl: error: <where the key is set>: "


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("loss", ["clip", "cispo"])
def test_every_algorithm_passes_the_check(tmp_path, capsys, name, loss):
    critic = [] if ADVANTAGES[name].critic else ["critic=null"]
    overrides = [f"ppo.advantage={name}", f"ppo.loss={loss}", "ppo.ratio_level=sequence", "ppo.kl.place=loss", "ppo.reward_scale=normal"]
    assert cli.run(["ppo", str(write_run(tmp_path)), *overrides, *critic, "--check"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    counted = next(line for line in printed.splitlines() if line.startswith("optimizer steps"))
    assert counted.rstrip().endswith("= 6 of the critic, 6 of the actor" if not critic else "= 6 of the actor")
    table = printed[printed.index("Memory of") :]
    assert ("\ncritic " in table) == (not critic)
