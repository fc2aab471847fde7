"""The transport in a real sync: what memory it takes. And the shapes that benchmarks plan with: those of real models."""

import ctypes

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megarl.bridge.shapes import held, wanted
from megarl.config import ParallelConfig, RolloutConfig
from tests.ranks import run_all

ROUND_BYTES = 2 << 20
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8001,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SMALL = {"vocab_size": 201, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
MIXTURE = (
    LLAMA
    | SMALL
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    }
)
TIED = (
    LLAMA
    | SMALL
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
)
SHAPES = (
    (LLAMA, {"tensor": 2}),
    (LLAMA, {"pipeline": 2}),
    (TIED, {"tensor": 2}),
    (TIED, {"pipeline": 2}),
    (MIXTURE, {"expert": 2}),
    (MIXTURE, {"pipeline": 2}),
)


def test_a_sync_takes_four_rounds_and_one_module_and_shapes_are_those_of_real_models():
    memory, shapes = run_all([(peak_of_a_sync, ()), (differences, ())], 2)
    for rank in memory:
        module = 2 * 2048 // 2 * 768 * 2  # the largest: gate and up projection of one rank, bf16
        # vLLM packs a finished module into a new buffer before it drops the old one: a copy of the module that is its own.
        allowed = 4 * ROUND_BYTES + module + module + SLACK
        assert rank["target_bytes"] > 3 * allowed, "the bound would hold for any transport"
        assert rank["extra_bytes"] <= allowed, rank
        assert rank["staged_bytes"] <= module, rank
    assert shapes == [[], []]


SLACK = 1 << 20  # small things: work handles, lists of the interpreter


class PeakMemory(TorchDispatchMode):
    """The most that this process had allocated beyond the start, asked after every operation."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.start, self.extra_bytes, self.staged_bytes = engine, bytes_in_use(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.extra_bytes = max(self.extra_bytes, bytes_in_use() - self.start)
        self.staged_bytes = max(self.staged_bytes, sum(tensor.nbytes for tensor in self.engine._endpoint._staged.values()))
        return result


class MallocInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]


def bytes_in_use() -> int:
    """What glibc has handed out and not got back."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


class Owner:
    def __init__(self, pieces):
        self.pieces = pieces


def peak_of_a_sync(rank: int, world_size: int) -> dict[str, int]:
    """Two stages of a trainer into two tensor-parallel ranks: half of everything travels, and nothing stays in place on a CPU."""
    from megarl.bridge.sync import WeightSync
    from megarl.models.build import build_model
    from megarl.models.family import spec_from_hf_config
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.models.random_weights import RandomSource
    from megarl.parallel import groups
    from megarl.parallel.layout import RolloutLayout
    from megarl.rollout.vllm_engine import VllmEngine

    training = ParallelConfig(pipeline=2)
    layout = groups.initialize(training, seed=0)
    spec = spec_from_hf_config(LLAMA)
    rollout = RolloutConfig(prompts_per_step=1, max_response_tokens=4, kv_cache_bytes=8 << 20)
    engine = VllmEngine(spec, rollout, RolloutLayout(layout, 2), "bf16", 16)
    table = spec.table("actor")
    owner = Owner(source_pieces(build_model(spec, "actor", training, "bf16", layout), table))
    load_pieces(owner.pieces, RandomSource(table, seed=0))
    sync = WeightSync(engine, layout, bucket_bytes=ROUND_BYTES, verify_first=0)
    sync.push(owner, 1)  # plans
    with PeakMemory(engine) as memory:
        report = sync.push(owner, 2)
    wrong = wanted_differences(engine, spec)
    assert not wrong, wrong
    return {
        "extra_bytes": memory.extra_bytes,
        "staged_bytes": memory.staged_bytes,
        "target_bytes": report.received_bytes + report.local_bytes,
    }


def wanted_differences(engine, spec) -> list[str]:
    """Boxes that vLLM's trace and the benchmark's rules do not have in common."""
    rank = torch.distributed.get_rank()
    return sorted(map(str, set(engine.targets) ^ set(wanted(spec, 2, 1)[rank])))[:6]


def differences(rank: int, world_size: int) -> list[str]:
    """Pieces that Megatron's sharded state and the benchmark's rules do not have in common."""
    from megarl.models.build import build_model
    from megarl.models.family import spec_from_hf_config
    from megarl.models.pieces import source_pieces
    from megarl.parallel import groups

    found = []
    for config, parallel in SHAPES:
        training = ParallelConfig(**parallel)
        layout = groups.initialize(training, seed=0)
        spec = spec_from_hf_config(config | SMALL)
        pieces = source_pieces(build_model(spec, "actor", training, "fp32", layout), spec.table("actor"))
        wrong = {(piece.hf_name, piece.box) for piece in pieces} ^ set(held(spec, layout)[rank])
        found += [f"{config['model_type']} {parallel}: {item}" for item in sorted(map(str, wrong))[:4]]
    return found
