"""Step times that others have published, and what `megarl plan` estimates for the same models, batches, lengths and numbers of GPUs.

Sources: NeMo-Aligner (Shen et al. 2024, arXiv 2405.01481, PPO of Llama 3 70B on H100); NeMo RL's performance summary
(NVIDIA-NeMo/RL, docs/about/performance-summary.md, v0.4, GRPO on H100) with its recipes in examples/configs/recipes/llm/performance.
What they do not tell is assumed here and said in `ASSUMED`.
"""

from dataclasses import dataclass, field
from typing import Any

from megarl.config import PpoRun
from megarl.models.family import spec_from_hf_config
from megarl.models.spec import ModelSpec
from megarl.planner.devices import GPUS, Assumptions
from megarl.planner.plan import Plan, make_plan
from megarl.planner.step_time import Lengths, Machines

ASSUMED = (
    "NeMo-Aligner: prompts of 200 tokens (at most 512), responses of 350 (at most 1024); its actor and critic stand on GPUs of their own,"
    " ours share all of them (TP8 PP3, as 96 = 8 x 3 x 4). NeMo RL: prompts of 150 tokens, sequences of at most 4096, packed to 4096"
    " tokens a microbatch, a reference for the KL term, its own layouts. 400 Gbit/s a GPU between nodes"
)
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}
MIXTURE = QWEN3 | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}


def _shape(family: dict[str, Any], layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> ModelSpec:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "vocab_size": vocab, "head_dim": 128}
    return spec_from_hf_config(family | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | more)


MODELS = {
    "Llama 3 70B": _shape(LLAMA, 80, 8192, 28672, 64, 8, 128256),
    "Llama 3.1 8B": _shape(LLAMA, 32, 4096, 14336, 32, 8, 128256),
    "Qwen3 32B": _shape(QWEN3, 64, 5120, 25600, 64, 8, 151936),
    "Qwen3 30B-A3B": _shape(MIXTURE, 48, 2048, 6144, 32, 4, 151936, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
}


@dataclass(frozen=True)
class Published:
    """One published step. `sequence` tokens of an average one, `prompt` of them given; `samples` of each of `prompts`."""

    source: str
    model: str
    gpus: int
    seconds: float
    sequence: int
    prompt: int
    longest: tuple[int, int]  # prompt and response
    prompts: int
    samples: int
    minibatch: int
    generator: int  # tensor-parallel ranks
    parallel: dict[str, Any] = field(default_factory=dict)
    has_critic: bool = False

    @property
    def run(self) -> PpoRun:
        model = {"path": "model"}
        judge = {"kind": "model", "path": "judge"} if self.has_critic else {"kind": "exact"}
        return PpoRun.model_validate(
            {
                "output_dir": "out",
                "tokenizer": "tokenizer",
                "parallel": self.parallel,
                "actor": model,
                "critic": model if self.has_critic else None,
                "rewards": [judge],
                "data": {"path": "prompts.jsonl", "max_prompt_tokens": self.longest[0]},
                "rollout": {
                    "prompts_per_step": self.prompts,
                    "samples_per_prompt": self.samples,
                    "max_response_tokens": self.longest[1],
                    "tensor_parallel": self.generator,
                },
                "ppo": {
                    "total_steps": 10,
                    "minibatch_size": self.minibatch,
                    "advantage": "gae" if self.has_critic else "grpo",
                    "kl": {"coef": 0.01},
                },
            }
        )

    def plan(self) -> Plan:
        """Ours for the same."""
        spec, gpu = MODELS[self.model], GPUS["h100-80gb"]
        specs = {"actor": spec} | ({"critic": spec, "rewards.0": spec} if self.has_critic else {})
        machines = Machines(gpu, 50e9, 8, Assumptions())
        return make_plan(self.run, specs, self.gpus, machines, Lengths(self.prompt, self.sequence - self.prompt))


def _aligner(nodes: str, gpus: int, seconds: float) -> Published:
    parallel = {"tensor": 8, "pipeline": 3, "sequence": True, "microbatch_size": 1 if gpus > 384 else 2, "recompute": "full"}
    lengths = {"sequence": 550, "prompt": 200, "longest": (512, 1024)}
    batch = {"prompts": 1024, "samples": 1, "minibatch": 128, "generator": 8}
    return Published(f"NeMo-Aligner {nodes} nodes", "Llama 3 70B", gpus, seconds, parallel=parallel, has_critic=True, **lengths, **batch)


def _nemo_rl(model: str, gpus: int, seconds: float, sequence: int, generator: int, parallel: dict[str, Any]) -> Published:
    lengths = {"sequence": sequence, "prompt": 150, "longest": (256, 3840)}
    batch = {"prompts": 64, "samples": 32, "minibatch": 512, "generator": generator}
    return Published("NeMo RL v0.4", model, gpus, seconds, parallel={"max_tokens_per_microbatch": 4096} | parallel, **lengths, **batch)


STEPS = (
    _aligner("8 + 4", 96, 366.7),
    _aligner("16 + 8", 192, 190.4),
    _aligner("32 + 16", 384, 108.0),
    _aligner("64 + 32", 768, 56.9),
    _nemo_rl("Llama 3.1 8B", 16, 97.7, 1060, 1, {"pipeline": 2, "recompute": "full"}),
    _nemo_rl("Qwen3 32B", 32, 393.0, 3206, 4, {"tensor": 4, "pipeline": 4, "sequence": True}),
    _nemo_rl("Qwen3 30B-A3B", 32, 225.0, 3154, 2, {"expert": 8, "recompute": "full"}),
)


def published() -> list[dict[str, Any]]:
    """A row for each, with our seconds by phase."""
    rows = []
    for one in STEPS:
        plan = one.plan()
        time = plan.time
        rows.append(
            {
                "source": one.source,
                "model": one.model,
                "gpus": one.gpus,
                "published_s": one.seconds,
                "estimated_s": round(time.total, 1),
                "ratio": round(time.total / one.seconds, 2),
                **{name: round(seconds, 1) for name, seconds in time.seconds.items()},
                "fits": plan.fits,
                "peak_GiB": round(plan.peak.total / 2**30, 1),
            }
        )
    return rows
