"""Bytes between the accelerator and host memory in a step, by the table of phases. Pure."""

from megarl.parallel.phases import FROZEN, REFERENCE, RESIDENT, Phase
from megarl.planner.memory import MemoryPlan

ORDER: tuple[Phase, ...] = ("generating", "scoring", "learning", "publishing")  # and again


def moved_bytes(memory: MemoryPlan, stage: int) -> int:
    """What a rank of this stage copies in one step, both ways. Frozen weights never change: they only come. Gradients are not copied."""
    total = 0
    for model in memory.models:
        is_frozen = model.owner in (FROZEN, REFERENCE)
        if memory.offload == "none" or (memory.offload == "frozen" and not is_frozen):
            continue
        for part in ("weights", "optimizer", "ema"):
            size = getattr(model.owned[stage], part)
            for before, after in zip(ORDER, (*ORDER[1:], ORDER[0]), strict=True):
                was, is_here = ((model.owner, part) in RESIDENT[phase] for phase in (before, after))
                total += size * (is_here and not was)
                total += size * (was and not is_here and model.owner != FROZEN)
    return total
