"""The pairs of a trainer's and a sampler's layout that must agree, as data. A new layout or family is a line in `PAIRS`."""

from dataclasses import dataclass, field
from typing import Literal

from megarl.config import ParallelConfig

Precision = Literal["fp32", "bf16"]
SHORT = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP", "expert": "EP"}


@dataclass(frozen=True)
class Pair:
    """One family under the trainer's keys of `parallel` on `ranks` ranks, sampled from by replicas of `generator` tensor-parallel ranks.

    `sizes` replace those of `tiny_models`, `precision` is (trainer's, sampler's). With `learns` the weights that are compared come out of
    an optimizer step: views into the buffers of Megatron's DDP, float32 masters where the model is bf16.
    """

    family: str
    ranks: int
    parallel: dict
    generator: int
    sizes: dict[str, int] = field(default_factory=dict)
    precision: tuple[Precision, Precision] = ("fp32", "fp32")
    learns: bool = False
    is_quick: bool = False  # a part of every test run

    @property
    def training(self) -> ParallelConfig:
        return ParallelConfig(**self.parallel)

    @property
    def data(self) -> int:
        """The trainer's replicas."""
        return self.ranks // (self.training.tensor * self.training.pipeline * self.training.context)

    @property
    def trainer(self) -> str:
        words = [f"{short}{self.parallel[key]}" for key, short in SHORT.items() if key in self.parallel]
        words += ["SP"] if self.training.sequence else []
        words += [f"DP{self.data}"] if self.data > 1 or not words else []
        return " ".join(words)

    @property
    def sampler(self) -> str:
        replicas = self.ranks // self.generator
        return (f"{replicas} x " if replicas > 1 else "") + f"TP{self.generator}"

    @property
    def model(self) -> str:
        """The family and what is not as in the other pairs."""
        words = [f"{name} {size}" for key, name in NAMES.items() if (size := self.sizes.get(key)) is not None]
        words += ["after a step"] if self.learns else []
        words += [" to ".join(dict.fromkeys(self.precision))] if self.precision != ("fp32", "fp32") else []
        return ", ".join([self.family, *words])

    def __str__(self) -> str:
        return f"{self.model}: {self.trainer} -> {self.sampler}"


NAMES = {
    "num_attention_heads": "heads",
    "num_key_value_heads": "key-value heads",
    "num_hidden_layers": "layers",
    "vocab_size": "vocabulary",
}
TP2, TP3, TP4 = ({"tensor": tensor} for tensor in (2, 3, 4))
PP2, PP3, PP4 = ({"pipeline": pipeline} for pipeline in (2, 3, 4))
EP2, EP4 = {"expert": 2}, {"expert": 4}
CP2, SP, VPP2 = {"context": 2}, {"sequence": True}, {"virtual_pipeline": 2}
DP: dict = {}
FIVE_LAYERS = {"num_hidden_layers": 5}
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 192}
EIGHT_HEADS = {"num_attention_heads": 8, "hidden_size": 256}
THREE_OF_ALL = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 192}
TO_BF16, BF16 = ("fp32", "bf16"), ("bf16", "bf16")

# A tiny model has 4 heads in 2 key-value groups, 2 layers, and 201 tokens: every vocabulary shard is padded, on both sides.
PAIRS = [
    # two ranks
    Pair("llama", 2, TP2, 2, is_quick=True),  # equal layouts: nothing moves
    Pair("llama", 2, DP, 1),
    Pair("llama", 2, DP, 2),
    Pair("llama", 2, TP2, 2, {"vocab_size": 256}),  # not padded on either side
    Pair("llama", 2, TP2, 1, precision=TO_BF16),
    Pair("llama", 2, PP2 | VPP2, 2, FIVE_LAYERS, is_quick=True),  # 2, 1, 1 and 1 layers a chunk
    Pair("llama", 2, PP2, 2, {"num_key_value_heads": 1}),  # one key-value head on both sampling ranks
    Pair("qwen2", 2, PP2, 2, precision=BF16, learns=True, is_quick=True),
    Pair("qwen2", 2, TP2 | SP, 1),
    Pair("qwen2", 2, CP2, 1),
    Pair("qwen3-tied", 2, PP2, 2, is_quick=True),  # embedding and head: one tensor, on both stages
    Pair("qwen3-tied", 2, TP2, 1, learns=True),
    Pair("gemma3", 2, TP2 | SP, 1, learns=True),
    Pair("qwen3-moe", 2, EP2, 2, is_quick=True),
    Pair("qwen3-moe", 2, PP2, 2),
    Pair("gemma3", 2, PP2, 2),  # 3 layers; embedding and head are one tensor here, too
    Pair("mistral", 2, TP2, 1),
    Pair("mixtral", 2, TP2 | SP, 2),
    Pair("mixtral", 2, TP2 | SP | EP2, 1, precision=TO_BF16),
    # three
    Pair("llama", 3, PP3, 1, FIVE_LAYERS),
    Pair("qwen3-tied", 3, PP3, 3, THREE_OF_ALL),
    # four
    Pair("llama", 4, TP2 | PP2, 4),  # more sampling ranks than key-value heads
    Pair("llama", 4, TP4 | SP, 2),  # more training ranks than key-value heads: a shard cuts through a group
    Pair("llama", 4, TP4, 4, {"num_key_value_heads": 1}),
    Pair("llama", 4, TP2 | PP2, 4, {"num_key_value_heads": 4}),
    Pair("llama", 4, PP4, 2, FIVE_LAYERS),
    Pair("llama", 4, PP2 | VPP2, 1, FIVE_LAYERS),
    Pair("llama", 4, TP2 | CP2, 4),
    Pair("qwen2", 4, TP2, 4),  # biases of replicated key-value heads
    Pair("qwen2", 4, TP2 | SP | PP2, 1, precision=BF16, learns=True),
    Pair("qwen2", 4, DP, 4),
    Pair("qwen3-tied", 4, TP2 | PP2, 2),
    Pair("qwen3-tied", 4, CP2 | PP2, 2, learns=True),
    Pair("gemma3", 4, TP2 | SP | PP2, 4, learns=True),
    Pair("mistral", 4, TP4 | SP, 2),
    Pair("gemma3", 4, TP2 | PP2, 4),
    Pair("qwen3-moe", 4, PP2 | EP2, 1),
    Pair("qwen3-moe", 4, TP2 | SP | EP4, 2),
    Pair("mixtral", 4, EP4, 4, learns=True),
    Pair("mixtral", 4, TP2 | SP | EP2, 4),
    # six and eight
    Pair("llama", 6, TP3 | PP2, 2, SIX_HEADS),  # neither side's shards divide the other's
    Pair("llama", 8, TP2 | PP2, 4),
    Pair("qwen2", 8, TP2 | PP2 | CP2, 2),
    Pair("llama", 8, TP4 | SP | PP2, 1, EIGHT_HEADS),
    Pair("qwen3-moe", 8, TP2 | SP | PP2 | EP4, 4),
]
