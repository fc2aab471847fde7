"""What each advantage estimator needs of a run. No torch: `--check` reads this on any machine; `ppo.estimators` holds the formulas."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """`critic`: learned values. `group`: several samples of one prompt. `greedy`: the likeliest response to every prompt, judged but not
    learned from. `whitens`: its paper whitens the advantages (`ppo.whiten` null).
    """

    critic: bool = False
    group: bool = False
    greedy: bool = False
    whitens: bool = False


ADVANTAGES: dict[str, Needs] = {
    "gae": Needs(critic=True, whitens=True),
    "single_step": Needs(critic=True),
    "rloo": Needs(group=True),
    "grpo": Needs(group=True),
    "dr_grpo": Needs(group=True),
    "remax": Needs(greedy=True),
    "reinforce_pp": Needs(whitens=True),
    "reinforce_pp_baseline": Needs(group=True, whitens=True),
}
