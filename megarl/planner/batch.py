"""The arithmetic of batches: what an optimizer step is cut into, and the largest microbatch that a stage may see. Pure."""

import math
from dataclasses import dataclass

from megarl.config import LessonRun, ParallelConfig, PpoRun, Run, SampleRun
from megarl.cross_check import layout_of, longest_row, longest_sequence
from megarl.data.pack_size import tile_of, token_budget
from megarl.parallel.layout import ParallelLayout
from megarl.planner.activations import Microbatch

TOKENS_A_TENSOR_RANK = 8  # T of a rollout is a multiple of this on every tensor-parallel rank, T of a lesson's batch of this


@dataclass(frozen=True)
class Batch:
    """The arithmetic of one optimizer step: `size` = microbatches x microbatch_size x data.

    With packing (`max_tokens`), these are the microbatches of the longest rows: real ones are fewer.
    """

    size: int
    microbatches: int
    microbatch_size: int
    data: int
    max_tokens: int = 0

    def words(self, unit: str) -> str:
        """How the batch is cut."""
        if self.max_tokens:
            return f"at most {self.microbatches} microbatches of {self.max_tokens} tokens x data {self.data}"
        return f"{self.microbatches} microbatches x {self.microbatch_size} {unit} x data {self.data}"


def batch_of(run: Run, world_size: int) -> Batch:
    """How one optimizer step is cut."""
    layout = layout_of(run, world_size)
    if isinstance(run, SampleRun):  # no step, but what is scored is cut like one
        size = run.rollout.prompts_per_step * run.rollout.samples_per_prompt
    else:
        size = run.ppo.minibatch_size if isinstance(run, PpoRun) else run.train.batch_size
    most, rows = run.parallel.max_tokens_per_microbatch, run.parallel.microbatch_size
    if isinstance(run, LessonRun):
        rows = max(1, rows // run.sequences_per_row)
    if most:
        rows = max(1, token_budget(run.parallel) // longest_row(run))
    return Batch(size, math.ceil(size // layout.data / rows), rows, layout.data, most)


def scoring_microbatches(run: PpoRun | SampleRun, layout: ParallelLayout) -> int:
    """Microbatches of a whole rollout on one data-parallel replica."""
    rows = run.rollout.prompts_per_step * run.rollout.samples_per_prompt // layout.data
    most = run.parallel.microbatch_size
    if run.parallel.max_tokens_per_microbatch:
        most = max(1, token_budget(run.parallel) // longest_row(run))
    return max(1, math.ceil(rows / most))


def largest_microbatch(run: Run, layout: ParallelLayout) -> Microbatch:
    """The largest one, all sequences as long as they may be."""
    parallel, (longest, _, _) = run.parallel, longest_sequence(run)
    if parallel.max_tokens_per_microbatch:
        budget = -(-token_budget(parallel) // tile_of(parallel)) * tile_of(parallel)
        return Microbatch(budget, 1, budget)
    is_rollout = isinstance(run, PpoRun | SampleRun)
    multiple = TOKENS_A_TENSOR_RANK * (parallel.tensor if is_rollout else 1)
    tokens = -(-longest // multiple) * multiple
    positions = _positions(run.parallel, tokens)
    batch = batch_of(run, layout.world_size)
    rows = max(1, batch.size // layout.data)
    count = max(1, math.ceil(rows / batch.microbatch_size))
    if parallel.virtual_pipeline > 1:
        count = math.ceil(count / parallel.pipeline) * parallel.pipeline
    width = max(1, math.ceil(rows / count)) * (run.sequences_per_row if isinstance(run, LessonRun) else 1)
    spoken = run.rollout.max_response_tokens if is_rollout else tokens
    return Microbatch(positions, width, width * min(spoken, tokens))


def text_microbatches(run: Run, layout: ParallelLayout) -> tuple[Microbatch, int] | None:
    """The largest microbatch of the text that a policy imitates in every update (`ppo.ptx`), and how many there are at most; else None."""
    ptx = run.ppo.ptx if isinstance(run, PpoRun) else None
    if ptx is None:
        return None
    parallel, rows = run.parallel, max(1, ptx.batch_size // layout.data)
    if parallel.max_tokens_per_microbatch:
        at_once = max(1, token_budget(parallel) // ptx.data.max_tokens)
        return largest_microbatch(run, layout), math.ceil(rows / at_once)
    count = math.ceil(rows / parallel.microbatch_size)
    if parallel.virtual_pipeline > 1:
        count = math.ceil(count / parallel.pipeline) * parallel.pipeline
    width, tokens = math.ceil(rows / count), -(-ptx.data.max_tokens // TOKENS_A_TENSOR_RANK) * TOKENS_A_TENSOR_RANK
    return Microbatch(_positions(parallel, tokens), width, width * tokens), count


def _positions(parallel: ParallelConfig, tokens: int) -> int:
    """Positions of a model's input, which divide where activations are split along tokens."""
    split = parallel.tensor if parallel.sequence else 1
    multiple = split if parallel.context == 1 else parallel.context * math.lcm(2, split)
    return -(-tokens // multiple) * multiple
