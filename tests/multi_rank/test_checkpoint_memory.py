"""A rank needs memory for what it holds, and beside it for one block: loading under another layout, and saving."""

from functools import partial
from pathlib import Path

import pytest

from tests.course.lesson_files import sft_run, write_files
from tests.ranks import run_ranks

BIG = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}  # 18 M weights
BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32
BESIDE = 40 << 20  # a block of the file, a block of the tensor, the manifest, allocators


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def growth(work) -> int:
    """Bytes by which resident memory rose at most during `work`."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present
    work()
    return resident("VmHWM") - before


def start(run, rank: int):
    """The parts of a lesson, and bytes of what this rank holds: all of it touched, so that its memory is there."""
    from megarl.course.lesson import build_parts
    from megarl.course.sft import HEADLINE, DemonstrationSet, Imitation
    from megarl.parallel import groups

    layout = groups.initialize(run.parallel, run.seed)
    parts = build_parts("sft", run, layout, "actor", DemonstrationSet, partial(Imitation, run.parallel.logits_bytes), HEADLINE)
    slots = parts.student.learner.optimizer_pieces(parts.student.pieces)
    for piece in (piece for pieces in slots.values() for piece in pieces):
        piece.view.fill_(rank + 1.5)
    return parts, sum(piece.view.nbytes for pieces in (parts.student.pieces, *slots.values()) for piece in pieces)


def save(rank: int, root: Path) -> dict[str, int]:
    from megarl.checkpoint.store import Checkpoints
    from megarl.checkpoint.train_state import TrainState

    parts, _ = start(sft_run(root, "run", 9, checkpoint={"background": "off"}), rank)
    student = {"actor": parts.student}
    parts.checkpoints.restore_or_start(student)
    found = {"saving": growth(lambda: parts.checkpoints.save(TrainState(step=1), student))}
    behind = Checkpoints("sft", sft_run(root, "behind", 9), parts.checkpoints.layout, parts.checkpoints.tokenizer, 9)
    behind.restore_or_start(student)

    def copy(step: int) -> None:
        behind.save(TrainState(step=step), student)
        behind.finish()

    found |= {name: growth(partial(copy, step)) for step, name in ((1, "first copy"), (2, "second copy"))}
    return found | {"buffers": behind._buffers.num_bytes}


def load(rank: int, root: Path) -> dict[str, int]:
    parallel = {"tensor": 2, "sequence": True, "microbatch_size": 4}
    parts, own = start(sft_run(root, "run", 9, parallel=parallel), rank)
    return {"own": own, "loading": growth(lambda: parts.checkpoints.restore_or_start({"actor": parts.student}))}


def measure(rank: int, world_size: int, root: Path) -> dict[str, int]:
    from megarl.models import pieces

    pieces.BLOCK_ELEMENTS = BLOCK_ELEMENTS
    return save(rank, root) | load(rank, root)


@pytest.mark.slow
def test_memory_beside_the_model_does_not_grow_with_it(tmp_path):
    for found in run_ranks(measure, 2, write_files(tmp_path, **BIG)):
        assert found["own"] > 2.5 * BESIDE, "the model is large against what is allowed beside it"
        assert found["loading"] < BESIDE and found["saving"] < BESIDE, found
        assert found["buffers"] - BESIDE < found["first copy"] < found["buffers"] + BESIDE, found
        assert found["second copy"] < BESIDE, "buffers are used again"
