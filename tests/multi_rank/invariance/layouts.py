"""The layouts under which everything must come out the same, as data. A new axis is a line in one of the lists."""

from dataclasses import dataclass, field

VOCAB = 100  # no multiple of tensor ranks or of 64
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN3 = {"head_dim": 16, "tie_word_embeddings": True}
FAMILIES = {
    "llama": BASE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2": BASE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3 tied": BASE | QWEN3 | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "mistral": BASE | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 5},
    "gemma3": BASE
    | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_act": None, "head_dim": 16, "tie_word_embeddings": True}
    | {
        "sliding_window": 5,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 100.0,
        "query_pre_attn_scalar": 12,
    },  # every other is local
    "mixtral": BASE | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3-moe": BASE
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "tie_word_embeddings": True}
    | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True, "decoder_sparse_step": 1}
    | {"mlp_only_layers": []},
}
DENSE = ("llama", "qwen2", "qwen3 tied")
MIXTURES = ("mixtral", "qwen3-moe")
LOCAL = ("mistral", "gemma3")
SHORT = {
    "tensor": "tp",
    "pipeline": "pp",
    "virtual_pipeline": "vpp",
    "context": "cp",
    "expert": "ep",
    "microbatch_size": "mbs",
    "max_tokens_per_microbatch": "pack",
    "logits_bytes": "logits",
}


ONLINE = ("actor", "critic", "sft", "reward")  # who learns under a layout, unless it says otherwise
PREFERENCES = ("dpo", "ipo", "rrhf", "reward with margins", "reward over tokens")


@dataclass(frozen=True)
class Layout:
    """One way to compute the same: `ranks`, and the keys of `parallel` that differ from their defaults."""

    family: str
    ranks: int
    parallel: dict = field(default_factory=dict)
    layers: int = 3
    ppo: dict = field(default_factory=dict)
    learners: tuple[str, ...] = ONLINE

    @property
    def reference(self) -> "Layout":
        """The same work on one rank, all sequences side by side in one microbatch."""
        return Layout(self.family, 1, layers=self.layers, ppo=self.ppo, learners=self.learners)

    @property
    def hf_config(self) -> dict:
        return FAMILIES[self.family] | {"num_hidden_layers": self.layers}

    @property
    def way(self) -> str:
        """What is split and how, without family and ranks."""
        replica = self.parallel.get("tensor", 1) * self.parallel.get("pipeline", 1) * self.parallel.get("context", 1)
        words = [f"dp{self.ranks // replica}"] if self.ranks > replica else []
        words += [f"{short}{self.parallel[key]}" for key, short in SHORT.items() if key in self.parallel]
        words += ["sp"] if self.parallel.get("sequence") else []
        words += [f"recompute={self.parallel['recompute']}"] if "recompute" in self.parallel else []
        words += ["head=" + self.parallel["head"]] if "head" in self.parallel else []
        words += ["whole optimizer"] if self.parallel.get("distributed_optimizer") is False else []
        words += [self.ppo["aggregation"]] if "aggregation" in self.ppo else []
        words += [f"{self.layers} layers"] if self.layers != 3 else []
        words += ["preferences"] if self.learners == PREFERENCES else []
        return " ".join(words) or "one microbatch"

    def __str__(self) -> str:
        return f"{self.family}, {self.ranks} rank{'s' * (self.ranks > 1)}: {self.way}"


def rows(
    family: str, ranks: int, *parallel: dict, layers: int = 3, ppo: dict | None = None, learners: tuple[str, ...] = ONLINE
) -> list[Layout]:
    """One family on so many ranks in several ways."""
    return [Layout(family, ranks, keys, layers, ppo or {}, learners) for keys in parallel]


SEQUENCE_MEAN = {"aggregation": "sequence_mean"}
SP2 = {"tensor": 2, "sequence": True}
SMALL_LOGITS = {"logits_bytes": 2000}  # a few tokens of the vocabulary

# Most axes once or twice, on one and two ranks: the slice of every test run.
CI = [
    *rows("llama", 1, {"microbatch_size": 3} | SMALL_LOGITS, {"max_tokens_per_microbatch": 32, "recompute": "full"}),
    *rows("llama", 2, {"tensor": 2}, {"pipeline": 2, "microbatch_size": 3, "head": "last_stage"}, {"distributed_optimizer": False}),
    *rows("qwen3 tied", 2, {"pipeline": 2, "microbatch_size": 1, "head": "sharded"}, {"context": 2, "recompute": "selective"}),
    *rows("gemma3", 1, {"max_tokens_per_microbatch": 32}),
    *rows("gemma3", 2, {"context": 2, "microbatch_size": 3}),
    *rows("mixtral", 2, {"expert": 2, "microbatch_size": 2}),
    *rows("llama", 2, {"microbatch_size": 4}, SP2, {"pipeline": 2, "max_tokens_per_microbatch": 64}, learners=PREFERENCES),
]
# Combinations on four ranks, which with the above make the short list.
FOUR = [
    *rows("qwen2", 4, SP2 | {"pipeline": 2, "microbatch_size": 3, "max_tokens_per_microbatch": 32}),
    *rows("qwen3 tied", 4, SP2 | {"context": 2}),
    *rows("llama", 4, {"tensor": 4, "sequence": True}),  # more ranks than key-value heads; two hold no real token of the vocabulary
    *rows("qwen3-moe", 4, SP2 | {"expert": 4, "microbatch_size": 3}),
    *rows("llama", 4, {"pipeline": 2, "virtual_pipeline": 2, "microbatch_size": 2}, layers=5),
]

_DENSE_ON_ONE = [
    {"microbatch_size": 1},
    {"microbatch_size": 3} | SMALL_LOGITS,
    {"max_tokens_per_microbatch": 32},
    {"recompute": "selective", "microbatch_size": 2},
    {"recompute": "full"},
]
_DENSE_ON_TWO = [
    {"microbatch_size": 3},
    {"distributed_optimizer": False, "microbatch_size": 2},
    {"max_tokens_per_microbatch": 24},
    {"tensor": 2},
    SP2 | {"microbatch_size": 3, "recompute": "selective"},
    SP2 | {"max_tokens_per_microbatch": 32},
    {"pipeline": 2, "microbatch_size": 3, "head": "last_stage"} | SMALL_LOGITS,
    {"pipeline": 2, "microbatch_size": 1, "head": "sharded"} | SMALL_LOGITS,
    {"pipeline": 2, "max_tokens_per_microbatch": 32, "recompute": "full"},
    {"context": 2, "microbatch_size": 3},
    {"context": 2, "max_tokens_per_microbatch": 32, "recompute": "selective"},
]
_DENSE_ON_FOUR = [
    {"microbatch_size": 1},
    {"tensor": 2, "microbatch_size": 3},
    {"tensor": 4, "sequence": True},  # more ranks than key-value heads
    SP2 | {"pipeline": 2, "microbatch_size": 3, "head": "sharded"},
    SP2 | {"pipeline": 2, "max_tokens_per_microbatch": 32, "head": "last_stage"},
    {"pipeline": 2, "microbatch_size": 2, "distributed_optimizer": False},
    SP2 | {"context": 2, "recompute": "full"},
    {"pipeline": 2, "context": 2, "microbatch_size": 3, "head": "sharded"},
    {"pipeline": 2, "context": 2, "max_tokens_per_microbatch": 32},
    {"pipeline": 2, "context": 2, "microbatch_size": 2, "head": "last_stage"} | SMALL_LOGITS,
    {"tensor": 2, "pipeline": 2, "microbatch_size": 2, "recompute": "full"},
    SP2 | {"microbatch_size": 2, "distributed_optimizer": False},
    {"context": 2, "microbatch_size": 2},
    SP2 | {"context": 2, "max_tokens_per_microbatch": 64},
    {"context": 4},
]
_DENSE_ON_EIGHT = [
    {"microbatch_size": 1},
    SP2 | {"context": 2, "microbatch_size": 2, "distributed_optimizer": False},
    {"pipeline": 2, "context": 4, "head": "sharded"},
    SP2 | {"pipeline": 2, "context": 2, "max_tokens_per_microbatch": 64},
    SP2 | {"pipeline": 2, "microbatch_size": 2, "recompute": "selective"},
    SP2 | {"pipeline": 2, "context": 2, "microbatch_size": 3},
    {"tensor": 4, "sequence": True, "pipeline": 2, "max_tokens_per_microbatch": 32},
]
_DEEP_ON_FOUR = [
    {"pipeline": 4, "microbatch_size": 1, "head": "sharded"},  # one microbatch has fewer tokens to learn than there are stages
    {"pipeline": 2, "virtual_pipeline": 2, "microbatch_size": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "max_tokens_per_microbatch": 32, "distributed_optimizer": False},
    SP2 | {"pipeline": 2, "virtual_pipeline": 2, "microbatch_size": 1},
    {"pipeline": 2, "virtual_pipeline": 2, "context": 2, "microbatch_size": 3},
]
_DEEP_ON_EIGHT = [
    {"pipeline": 8, "microbatch_size": 1, "head": "sharded"},
    {"pipeline": 4, "virtual_pipeline": 2, "microbatch_size": 1},
    SP2 | {"pipeline": 4, "microbatch_size": 2},
    {"pipeline": 4, "context": 2, "microbatch_size": 2, "head": "sharded"},
    SP2 | {"pipeline": 2, "virtual_pipeline": 2, "context": 2, "microbatch_size": 3},
]
# Local layers: windows that end in another pack, chunk or rank.
_LOCAL_ON_ONE = [{"max_tokens_per_microbatch": 32}, {"microbatch_size": 3, "recompute": "full"}]
_LOCAL_ON_TWO = [
    SP2 | {"max_tokens_per_microbatch": 32, "recompute": "selective"},
    {"pipeline": 2, "microbatch_size": 1, "head": "sharded"} | SMALL_LOGITS,
    {"context": 2, "microbatch_size": 3},
    {"microbatch_size": 3},
]
_LOCAL_ON_FOUR = [
    SP2 | {"pipeline": 2, "microbatch_size": 3, "head": "sharded"},
    SP2 | {"context": 2, "recompute": "full"},
    {"pipeline": 2, "context": 2, "max_tokens_per_microbatch": 32},
    {"context": 4},
]
_MIXTURE_ON_TWO = [
    {},
    {"expert": 2},
    {"expert": 2, "max_tokens_per_microbatch": 24},
    SP2,
    SP2 | {"expert": 2, "microbatch_size": 3},
    {"pipeline": 2, "microbatch_size": 2},
    {"context": 2, "expert": 2, "microbatch_size": 3},
]
_MIXTURE_ON_FOUR = [
    {"context": 2, "expert": 4, "microbatch_size": 2},
    {"pipeline": 2, "context": 2, "expert": 2, "max_tokens_per_microbatch": 32},
    {"expert": 2, "microbatch_size": 2},
    {"expert": 4},
    SP2 | {"expert": 4, "recompute": "full"},
    {"pipeline": 2, "expert": 2, "microbatch_size": 2},
    SP2 | {"pipeline": 2, "expert": 2, "microbatch_size": 3},
]
_MIXTURE_ON_EIGHT = [
    SP2 | {"pipeline": 2, "expert": 4, "microbatch_size": 2},
    SP2 | {"pipeline": 2, "context": 2, "expert": 4, "recompute": "selective"},
    {"expert": 4, "distributed_optimizer": False},
]
_DEEP_MIXTURE_ON_FOUR = [{"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "microbatch_size": 2}]

# A list of four sequences has up to 52 tokens.
_PREFERENCES_ON_ONE = [{"microbatch_size": 4}, {"max_tokens_per_microbatch": 64, "recompute": "full"} | SMALL_LOGITS]
_PREFERENCES_ON_TWO = [
    {"microbatch_size": 4},
    {"max_tokens_per_microbatch": 64},
    {"tensor": 2},
    SP2 | {"max_tokens_per_microbatch": 64},
    {"pipeline": 2, "microbatch_size": 4, "head": "last_stage"} | SMALL_LOGITS,
    {"pipeline": 2, "microbatch_size": 4, "head": "sharded"} | SMALL_LOGITS,
    {"pipeline": 2, "max_tokens_per_microbatch": 64},
    {"context": 2, "microbatch_size": 4},
]
_PREFERENCES_ON_FOUR = [
    SP2 | {"pipeline": 2, "microbatch_size": 8, "head": "sharded"},
    {"pipeline": 2, "max_tokens_per_microbatch": 64},
    {"pipeline": 2, "context": 2, "max_tokens_per_microbatch": 64},
]

NIGHTLY = [
    *(row for family in DENSE for row in rows(family, 1, *_DENSE_ON_ONE)),
    *(row for family in DENSE for row in rows(family, 2, *_DENSE_ON_TWO)),
    *(row for family in DENSE for row in rows(family, 4, *_DENSE_ON_FOUR)),
    *(row for family in DENSE for row in rows(family, 4, *_DEEP_ON_FOUR, layers=5)),
    *(row for family in DENSE for row in rows(family, 8, *_DENSE_ON_EIGHT)),
    *(row for family in DENSE for row in rows(family, 8, *_DEEP_ON_EIGHT, layers=8)),
    *rows("llama", 2, {"pipeline": 2, "microbatch_size": 3}, {"microbatch_size": 3}, {"tensor": 2}, ppo=SEQUENCE_MEAN),
    *rows("llama", 2, {"pipeline": 2, "microbatch_size": 3}, {"microbatch_size": 3}, ppo={"aggregation": "sequence_sum_fixed"}),
    *rows("llama", 4, {"pipeline": 2, "context": 2, "microbatch_size": 3}, ppo=SEQUENCE_MEAN),
    *(row for family in LOCAL for row in rows(family, 1, *_LOCAL_ON_ONE)),
    *(row for family in LOCAL for row in rows(family, 2, *_LOCAL_ON_TWO)),
    *(row for family in LOCAL for row in rows(family, 4, *_LOCAL_ON_FOUR)),
    *rows("gemma3", 4, {"pipeline": 2, "virtual_pipeline": 2, "microbatch_size": 2}, layers=5),
    *(row for family in LOCAL for row in rows(family, 8, SP2 | {"pipeline": 2, "context": 2, "max_tokens_per_microbatch": 64})),
    *(row for family in MIXTURES for row in rows(family, 1, {"microbatch_size": 3}, {"recompute": "full", "microbatch_size": 1})),
    *(row for family in MIXTURES for row in rows(family, 2, *_MIXTURE_ON_TWO)),
    *(row for family in MIXTURES for row in rows(family, 4, *_MIXTURE_ON_FOUR)),
    *(row for family in MIXTURES for row in rows(family, 4, *_DEEP_MIXTURE_ON_FOUR, layers=4)),
    *(row for family in MIXTURES for row in rows(family, 8, *_MIXTURE_ON_EIGHT)),
    *rows("qwen3-moe", 8, SP2 | {"expert": 8, "microbatch_size": 2}),
    *rows("llama", 1, *_PREFERENCES_ON_ONE, learners=PREFERENCES),
    *rows("llama", 2, *_PREFERENCES_ON_TWO, learners=PREFERENCES),
    *rows("llama", 4, *_PREFERENCES_ON_FOUR, learners=PREFERENCES),
    *rows("qwen3 tied", 2, {"pipeline": 2, "microbatch_size": 4}, learners=PREFERENCES),
    *rows("mixtral", 2, {"expert": 2, "microbatch_size": 4}, learners=PREFERENCES),
]
