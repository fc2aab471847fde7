"""How far sampler and trainer are apart when nothing is wrong, and what proving it costs.

`python -m benchmarks.parity [--quick] [--json PATH]`

`gaps`: tiny random models of every kind in both precisions; vLLM samples, the trainer reads the same tokens with the same weights. The
defaults of `rollout.parity_tolerance` lie above these. `digests`: speed of the digest of a weight slice beside that of copying it, and
what it allocates.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import alternating, main
from megarl.bridge.sync import WeightSync
from megarl.bridge.verify import digest
from megarl.checkpoint.sources import SafetensorsSource
from megarl.cli import leave
from megarl.config import ParallelConfig, RolloutConfig
from megarl.data.batching import pack
from megarl.models.build import build_model
from megarl.models.family import read_spec
from megarl.models.pieces import load_pieces, source_pieces
from megarl.models.replica import Replica
from megarl.models.token_stats import LogprobHead
from megarl.parallel import device, groups
from megarl.parallel.layout import RolloutLayout
from megarl.ppo.parity import DEFAULT_TOLERANCE, measure
from megarl.records import Prompt, Trajectory
from megarl.rollout.engine import make_requests
from megarl.rollout.vllm_engine import VllmEngine
from tests.rollout.tiny_models import save_tiny

KINDS = ("llama", "qwen2", "qwen3-tied", "mixtral", "qwen3-moe")
SIZES = {"num_hidden_layers": 4, "vocab_size": 1024, "max_position_embeddings": 256}
PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 32, 32, 96


class Owner:
    """What the weight sync asks of a role."""

    def __init__(self, pieces):
        self.pieces = pieces


def gap_of(kind: str, precision: str, layout, folder: Path) -> Mapping[str, Any]:
    """One row: sample, read again, compare."""
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()  # vLLM keeps its groups for the life of a process
    spec = read_spec(save_tiny(kind, 0, folder, **SIZES))
    rollout = RolloutConfig(prompts_per_step=PROMPTS, max_response_tokens=RESPONSE_TOKENS, kv_cache_bytes=64 << 20)
    engine = VllmEngine(spec, rollout, RolloutLayout(layout, 1), precision, PROMPT_TOKENS + RESPONSE_TOKENS)
    chunks = build_model(spec, "actor", ParallelConfig(), precision, layout)
    pieces = source_pieces(chunks, spec.table("actor"))
    load_pieces(pieces, SafetensorsSource(folder / f"{kind}-0"))
    WeightSync(engine, layout).push(Owner(pieces), 0)
    prompts = [Prompt(i, tuple((31 * i + 7 * j) % spec.vocab_size for j in range(1 + i % PROMPT_TOKENS))) for i in range(PROMPTS)]
    answers = engine.generate(make_requests(prompts, rollout, (), seed=(0, 0)))
    trajectories = [Trajectory(prompt, answer, 0.0) for prompt, answer in zip(prompts, answers)]
    batch = pack(trajectories, 0, PROMPT_TOKENS + RESPONSE_TOKENS, range(PROMPTS), range(PROMPTS)).to(device.device())
    logprobs = Replica(chunks, layout, 8).forward(batch, LogprobHead(64 << 20, 1.0, "response_mask"))
    gap = measure(batch.rollout_logprobs, logprobs, batch.response_mask, groups.group(layout, "dp"))
    numbers = {"mean": gap.mean, "p99": gap.p99, "max": gap.largest, "outside": gap.outside, "tokens": gap.num_tokens}
    return {"model": kind, "precision": precision, **numbers, "tolerance": DEFAULT_TOLERANCE[precision]}


def digest_row(dtype: torch.dtype, megabytes: int) -> Mapping[str, Any]:
    """Speed of a copy and of a digest of the same bytes, and of a digest of a slice of columns."""
    tensor = torch.randn((megabytes << 20) // dtype.itemsize, device=device.device()).to(dtype).view(-1, 4096)
    copy, columns = torch.empty_like(tensor), tensor[:, : tensor.shape[1] // 2]
    seconds = alternating({"copy": lambda: copy.copy_(tensor), "digest": lambda: digest(tensor), "columns": lambda: digest(columns)}, 5)
    sizes = {"copy": tensor.nbytes, "digest": tensor.nbytes, "columns": tensor.nbytes / 2}
    return {"dtype": str(dtype).removeprefix("torch."), "MiB": megabytes} | {
        f"{name} GB/s": sizes[name] / seconds[name] / 1e9 for name in seconds
    }


def measure_all(quick: bool) -> Mapping[str, Any]:
    """What goes to JSON."""
    layout = groups.initialize(ParallelConfig(), seed=0)
    with tempfile.TemporaryDirectory() as name:
        kinds = KINDS[:1] if quick else KINDS
        gaps = [gap_of(kind, precision, layout, Path(name)) for kind in kinds for precision in ("fp32", "bf16")]
    digests = [digest_row(dtype, 16 if quick else 256) for dtype in (torch.float32, torch.bfloat16)]
    return {"gaps": gaps, "digests": digests, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main("parity", "Gap between sampler and trainer, and the cost of digests.", measure_all)
    leave(0)  # without vLLM's destructors
