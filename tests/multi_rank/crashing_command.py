"""The command `megarl` with one rank that breaks while the others wait for it in a collective. Started by test_endings.py."""

from megarl import cli
from megarl.config import SftRun
from megarl.parallel.layout import ParallelLayout


def broken_lesson(run: SftRun, layout: ParallelLayout) -> None:
    import torch.distributed as dist

    if layout.rank == 1:
        raise ZeroDivisionError("rank 1 breaks")
    dist.barrier()


if __name__ == "__main__":
    cli._START["sft"] = broken_lesson
    cli.main()
