"""What a model is, apart from how it is spread over ranks: sizes and switches of a dense decoder. Pure: no torch, no Megatron.

Read one with `family.read_spec`. `ModelSpec.hf_config` is its serial form: `family.spec_from_hf_config` rebuilds the spec from it.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megarl.errors import LayoutError

if TYPE_CHECKING:
    from megarl.models.weight_table import WeightTable

# An actor (and its reference) ends in vocabulary logits, a critic (and a reward model) in one number a token.
Role = Literal["actor", "critic"]


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder: pre-norm attention with rotary positions and grouped queries, SwiGLU feed-forward, RMSNorm."""

    family: str  # Hugging Face `model_type`
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # None, or the four numbers of Llama 3's scaling
    tied: bool  # the vocabulary head is the embedding
    qkv_bias: bool
    qk_norm: bool  # RMSNorm of every query and key head
    max_positions: int
    hf_config: dict[str, Any] = field(repr=False)  # config.json as read

    def table(self, role: Role) -> "WeightTable":
        """The mapping between Megatron's tensors and Hugging Face's for this model in this role."""
        from megarl.models.family import FAMILIES  # the registry names the families, which are made of this file

        return FAMILIES[self.family].table(self, role)

    def num_parameters(self, role: Role) -> int:
        """Elements of all weights, the vocabulary without padding."""
        return self.table(role).num_parameters()


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding and the vocabulary head in Megatron: a multiple of 64 on each of `tensor` ranks.

    Rows past `vocab_size` are zero and mean no token; whoever takes a softmax over logits leaves their columns out.
    """
    step = 64 * tensor
    return (vocab_size + step - 1) // step * step


def stage_layers(num_layers: int, pipeline: int) -> tuple[int, ...]:
    """Layers of each pipeline stage. What does not divide goes to the first stages: the last one also has the head."""
    share, rest = divmod(num_layers, pipeline)
    return tuple(share + (stage < rest) for stage in range(pipeline))


def check_layout(spec: ModelSpec, tensor: int, pipeline: int, sequence: bool = False) -> None:
    """Raise `LayoutError` when the model cannot be cut over `tensor` ranks and `pipeline` stages; names the key to change."""
    for what, size in (("attention heads", spec.num_heads), ("feed-forward width", spec.ffn_size), ("hidden size", spec.hidden_size)):
        if size % tensor:
            raise LayoutError(f"parallel.tensor is {tensor} but the model's {what} are {size}; choose a divisor of {size}")
    if spec.num_kv_heads % tensor and tensor % spec.num_kv_heads:
        raise LayoutError(
            f"parallel.tensor is {tensor} but the model has {spec.num_kv_heads} key-value heads; choose a divisor or a multiple of them"
        )
    if pipeline > spec.num_layers:
        raise LayoutError(f"parallel.pipeline is {pipeline} but the model has {spec.num_layers} layers; choose at most {spec.num_layers}")
    if sequence and tensor == 1:
        raise LayoutError("parallel.sequence is on with parallel.tensor 1; sequence parallelism needs parallel.tensor of at least 2")
