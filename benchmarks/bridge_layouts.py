"""Plans for large clusters that are only simulated: bytes, balance, and the time it takes to plan."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megarl.bridge.boxes import TargetBox, intersect, num_elements
from megarl.bridge.plan import make_outline
from megarl.bridge.shapes import held, wanted
from megarl.models.family import spec_from_hf_config
from megarl.parallel.layout import ParallelLayout

ELEMENT_BYTES, RANKS_A_NODE = 2, 8
LINK = 45e9  # bytes a second that a GPU sends, and receives, between nodes: one 400 Gbit/s port
ROUND_BYTES = 256 << 20

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3-70B": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "Llama-3-405B": LLAMA | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "Qwen3-235B-A22B": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}


@dataclass(frozen=True)
class Case:
    """A trainer of tensor x pipeline x data ranks and generators of `sampler_tensor` ranks, on the same ranks or on others."""

    model: str
    tensor: int
    pipeline: int
    data: int
    sampler_tensor: int
    expert: int = 1
    generators: int = 0  # ranks of their own; 0: the trainer's

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout(self.tensor, self.pipeline, self.tensor * self.pipeline * self.data, expert=self.expert)

    def __str__(self) -> str:
        count = (self.generators or self.layout.world_size) // self.sampler_tensor
        expert = f" EP{self.expert}" if self.expert > 1 else ""
        where = " apart" if self.generators else ""
        return f"TP{self.tensor} PP{self.pipeline} DP{self.data}{expert} -> {count} x TP{self.sampler_tensor}{where}"


CASES = (
    Case("Llama-3-70B", 8, 8, 1, 8),
    Case("Llama-3-70B", 8, 4, 2, 8),
    Case("Llama-3-70B", 4, 8, 2, 8),
    Case("Llama-3-70B", 8, 8, 2, 8),
    Case("Llama-3-70B", 8, 8, 1, 4),
    Case("Llama-3-70B", 8, 8, 1, 8, generators=32),
    Case("Llama-3-70B", 8, 8, 16, 8),
    Case("Llama-3-405B", 8, 16, 1, 16),
    Case("Llama-3-405B", 8, 16, 4, 16),
    Case("Llama-3-405B", 8, 16, 8, 16),
    Case("Qwen3-235B-A22B", 4, 8, 2, 8, expert=8),
    Case("Qwen3-235B-A22B", 4, 8, 8, 8, expert=8),
    Case("Qwen3-235B-A22B", 4, 8, 32, 8, expert=8),
    Case("Qwen3-235B-A22B", 4, 4, 8, 8, expert=32, generators=64),
)
QUICK = (CASES[0], CASES[2], CASES[5], CASES[10])


# What others publish for moving a model to its generators; none of them was run here.
PEERS: tuple[dict[str, Any], ...] = (
    {"system": "verl checkpoint engine, apart", "model": "Qwen3-30B-A3B", "gpus": "not said", "seconds": "about 7"},
    {"system": "slime, colocated", "model": "Qwen3-30B-A3B", "gpus": "not said", "seconds": "7"},
    {"system": "NeMo-RL nccl_reshard, apart", "model": "Qwen3-30B-A3B", "gpus": "EP8 PP2 -> TP8 DP2, H100", "seconds": "0.74-1.0"},
    {"system": "NeMo-RL nccl_reshard, apart", "model": "DeepSeek-V3", "gpus": "PP16 EP16 -> TP32 DP8, H100", "seconds": "2.4-2.8"},
    {"system": "Moonshot checkpoint-engine", "model": "Qwen3-235B-A22B", "gpus": "8 x H800", "seconds": "6.2"},
    {"system": "Moonshot checkpoint-engine", "model": "Kimi-K2 FP8", "gpus": "256 x H20", "seconds": "16.0"},
    {"system": "Perplexity, RDMA writes", "model": "Kimi-K2", "gpus": "256 -> 128", "seconds": "1.3"},
    {"system": "vLLM sharded_rdt", "model": "235B", "gpus": "not said", "seconds": "2.7-3.4"},
)


def layouts(quick: bool) -> list[dict[str, Any]]:
    """One row a case. `bytes_over_bound` and `critical_over_bound` are 1 when nothing can be saved."""
    return [measure(case) for case in (QUICK if quick else CASES)]


def measure(case: Case, round_bytes: int = ROUND_BYTES) -> dict[str, Any]:
    """Plan a case and add up what every rank sends and receives."""
    spec = spec_from_hf_config(MODELS[case.model])
    source = list(held(spec, case.layout))
    replicas = (case.generators or len(source)) // case.sampler_tensor
    target: list[Sequence[TargetBox]] = list(wanted(spec, case.sampler_tensor, replicas))
    if case.generators:
        source, target = source + [()] * case.generators, [()] * len(source) + target
    start = time.process_time()
    outline = make_outline(source, target, bucket_bytes=round_bytes, element_bytes=ELEMENT_BYTES, node_of=lambda rank: rank // RANKS_A_NODE)
    planned = time.process_time()
    busiest = {int(outline.schedule.sent.argmax()), int(outline.schedule.received.argmax())}
    num_ops = [len(outline.write_out(rank).ops) for rank in sorted(busiest)]
    written = time.process_time()
    received, bound = outline.schedule.received, outline.bound
    lacking = _lacking(source, target)
    return {
        "model": case.model,
        "layout": str(case),
        "ranks": len(source),
        "received_gb": float(received.max()) * ELEMENT_BYTES / 1e9,
        "sent_gb": float(outline.schedule.sent.max()) * ELEMENT_BYTES / 1e9,
        "bytes_over_bound": float(received.sum() / lacking.sum()),
        "critical_over_bound": outline.schedule.critical / bound.critical,
        "rounds": outline.schedule.num_rounds,
        "seconds_at_45gb_s": outline.schedule.critical * ELEMENT_BYTES / LINK,
        "bound_s": bound.critical * ELEMENT_BYTES / LINK,
        "plan_cpu_s": planned - start,
        "own_ops": max(num_ops),
        "own_ops_cpu_s": (written - planned) / len(num_ops),
    }


def _lacking(source: Sequence[Sequence[tuple[str, tuple]]], target: Sequence[Sequence[TargetBox]]) -> np.ndarray:
    """Elements of its target that every rank does not hold, counted without the planner."""
    boxes: dict[int, dict[str, list]] = {}
    known: dict[tuple[int, int], int] = {}
    for pieces, targets in zip(source, target, strict=True):
        if id(targets) not in boxes:
            boxes[id(targets)] = {}
            for box in targets:
                boxes[id(targets)].setdefault(box.hf_name, []).append(box.hf_box)
        pair = (id(pieces), id(targets))
        if pair not in known:
            mine = boxes[id(targets)]
            common = (intersect(box, other) for name, box in dict.fromkeys(pieces) for other in mine.get(name, ()))
            known[pair] = sum(num_elements(box.hf_box) for box in targets) - sum(num_elements(box) for box in common if box)
    return np.array([known[id(pieces), id(targets)] for pieces, targets in zip(source, target, strict=True)])
