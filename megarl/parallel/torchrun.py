"""The ranks torchrun gave this process. Pure: importable before torch, so that a refusal costs nothing."""

import os


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun set them; (0, 1, 0) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))


def is_torchrun() -> bool:
    """True in a process that torchrun, or anything else that sets its variables, has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
