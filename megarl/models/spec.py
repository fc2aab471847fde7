"""What a model is, apart from how it is spread over ranks: its sizes, its switches, and the names of its weights. Pure: no torch.

Read a `ModelSpec` with `family.read_spec`. Its `hf_config` is its serial form: `family.spec_from_hf_config` rebuilds the spec from it.

One mapping, three users: the `WeightTable` says where every row of a Megatron tensor lies in a Hugging Face checkpoint, and import,
export and the bridge to the sampler all read it. Its keys are Megatron's canonical ones, as `sharded_state_dict` gives them: the same
for the local and the Transformer Engine layers and for every tensor and pipeline layout.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megarl.errors import LayoutError, WeightMapError

# An actor (and its reference) ends in vocabulary logits, a critic (and a reward model) in one number a token.
Role = Literal["actor", "critic"]
Activation = Literal["silu", "gelu_tanh"]
STANDARD_DEVIATION = 0.02  # Hugging Face's default `initializer_range` for these families


@dataclass(frozen=True)
class Rows:
    """Rows [row, row + num_rows) of a Megatron tensor are rows [hf_row, hf_row + num_rows) of `hf_name`; other axes are equal."""

    row: int
    num_rows: int
    hf_name: str
    hf_row: int

    def at(self, indices: Sequence[int]) -> "Rows":
        """The same with `{layer}` and `{expert}` in the name filled from the axes Megatron puts in front."""
        names = dict(zip(("layer", "expert"), indices, strict=False))
        return Rows(self.row, self.num_rows, self.hf_name.format(**names), self.hf_row)


@dataclass(frozen=True)
class WeightTable:
    """The table of one model in one role.

    `hf_shapes` lists every Hugging Face tensor with its shape; `entries` maps a canonical Megatron key to its rows, with
    `{layer}` in the names of tensors that every layer has and `{expert}` in those that every expert of a layer has. `aliases` are
    other names that Megatron's layers give the same tensor. `new_norm` is what the norms of a new model are filled with.
    """

    num_layers: int
    hf_shapes: dict[str, tuple[int, ...]]
    entries: dict[str, tuple[Rows, ...]]
    aliases: dict[str, str] = field(default_factory=dict)
    new_norm: float = 1.0

    def segments(self, megatron_key: str, indices: Sequence[int] = ()) -> list[Rows]:
        """The rows of one Megatron tensor; `indices` are its positions on prepended axes: the global layer, then the global expert.

        Raises `WeightMapError` for a key the family does not list.
        """
        megatron_key = self.aliases.get(megatron_key, megatron_key)
        if megatron_key not in self.entries:
            raise WeightMapError(f"the model holds {megatron_key}, which its family's table does not list; known: {sorted(self.entries)}")
        return [rows.at(indices) for rows in self.entries[megatron_key]]

    def num_parameters(self) -> int:
        """Elements of all Hugging Face tensors."""
        return sum(math.prod(shape) for shape in self.hf_shapes.values())


@dataclass(frozen=True)
class Mixture:
    """Every layer's feed-forward part is a choice: a router sends each token to some of the layer's experts (Shazeer et al. 2017).

    The router's probabilities weigh the experts' outputs; with `norm_topk_prob` those of the chosen ones are divided by their sum.
    """

    num_experts: int  # of each layer
    experts_per_token: int
    norm_topk_prob: bool


@dataclass(frozen=True)
class Window:
    """Some layers are local: a token looks back at a bounded number of tokens (Child et al. 2019)."""

    num_tokens: int  # that a token sees, itself included
    layers: tuple[bool, ...]  # whether each layer is local
    rope_theta: float | None = None  # of the local layers; None: that of all layers


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: pre-norm attention with rotary positions and grouped queries, gated feed-forward or a mixture of such, RMSNorm."""

    family: str  # Hugging Face `model_type`
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int  # of one expert in a mixture
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # None, a `factor` for all frequencies, or the four numbers of Llama 3's scaling
    tied: bool  # the vocabulary head is the embedding
    qkv_bias: bool
    qk_norm: bool  # RMSNorm of every query and key head
    max_positions: int
    hf_config: dict[str, Any] = field(repr=False)  # config.json as read, with the end tokens of generation_config.json
    make_table: Callable[["ModelSpec", Role], WeightTable] = field(repr=False, compare=False)  # the family's
    mixture: Mixture | None = None  # None: every layer is dense
    window: Window | None = None  # None: every token sees all tokens before it
    activation: Activation = "silu"  # of the feed-forward part's gate
    zero_centered_norms: bool = False  # norms multiply by 1 + weight
    output_norms: bool = False  # what attention and feed-forward add to the hidden states is normed, too
    embedding_scale: float = 1.0  # of the embedding as the first layer's input
    softmax_scale: float | None = None  # of query-key products; None: 1 / sqrt(head_dim)

    def table(self, role: Role) -> WeightTable:
        """The mapping between Megatron's tensors and Hugging Face's for this model in this role."""
        return self.make_table(self, role)

    @property
    def fits_transformer_engine(self) -> bool:
        """Whether Transformer Engine's layers compute this model; the others are computed by Megatron's local layers everywhere."""
        return self.window is None and not self.output_norms

    @property
    def standard_deviation(self) -> float:
        """Spread of freshly drawn weights: the config's `initializer_range`."""
        value = self.hf_config.get("initializer_range")
        return float(value) if isinstance(value, (int, float)) else STANDARD_DEVIATION

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, as the model's directory names them."""
        return end_ids(self.hf_config)

    def num_parameters(self, role: Role) -> int:
        """Elements of all weights, the vocabulary without padding."""
        return self.table(role).num_parameters()

    def num_expert_parameters(self) -> int:
        """Elements of all experts' weights, gate, up and down projections."""
        return 0 if self.mixture is None else self.num_layers * self.mixture.num_experts * 3 * self.hidden_size * self.ffn_size

    def num_active_parameters(self, role: Role) -> int:
        """Elements of the weights that one token meets: all of a dense model, `experts_per_token` experts a layer of a mixture."""
        if self.mixture is None:
            return self.num_parameters(role)
        idle = self.mixture.num_experts - self.mixture.experts_per_token
        return self.num_parameters(role) - self.num_expert_parameters() * idle // self.mixture.num_experts


def end_ids(values: dict[str, Any]) -> tuple[int, ...]:
    """The ids under `eos_token_id` of a config.json or generation_config.json, which may be one, several or none."""
    found = values.get("eos_token_id")
    return tuple(i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int) and not isinstance(i, bool))


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


def check_layout(spec: ModelSpec, tensor: int, pipeline: int, sequence: bool = False, expert: int = 1) -> None:
    """Raise `LayoutError` when the model does not fit `tensor` ranks, `pipeline` stages and `expert` ranks; names the key to change."""
    sizes = {"attention heads": spec.num_heads, "feed-forward width": spec.ffn_size, "hidden size": spec.hidden_size}
    if spec.mixture is not None:
        del sizes["feed-forward width"]  # experts stay whole
    for what, size in sizes.items():
        if size % tensor:
            raise LayoutError(f"parallel.tensor is {tensor} but the model's {what} are {size}; choose a divisor of {size}")
    if spec.num_kv_heads % tensor and tensor % spec.num_kv_heads:
        raise LayoutError(
            f"parallel.tensor is {tensor} but the model has {spec.num_kv_heads} key-value heads; choose a divisor or a multiple of them"
        )
    if pipeline > spec.num_layers:
        raise LayoutError(f"parallel.pipeline is {pipeline} but the model has {spec.num_layers} layers; choose at most {spec.num_layers}")
    if spec.mixture is not None and spec.mixture.num_experts % expert:
        raise LayoutError(f"parallel.expert is {expert} but a layer of the model has {spec.mixture.num_experts} experts; choose a divisor")
    if spec.mixture is not None and tensor > 1 and not sequence:
        raise LayoutError(f"parallel.tensor is {tensor} for a mixture of experts, which needs parallel.sequence as well: set it to true")
    if sequence and tensor == 1:
        raise LayoutError("parallel.sequence is on with parallel.tensor 1; sequence parallelism needs parallel.tensor of at least 2")


def quadratic_cost(spec: ModelSpec) -> float:
    """Work of attention on a sequence of L tokens over L^2, in units of all other work on one token.

    A weight takes 2 operations a token, a query-key pair 4 a channel of every head of every layer, and half of the pairs are causal
    (Kaplan et al. 2020, section 2.1). Windows are left out: sequences that are longer than one cost less than this.
    """
    return spec.num_layers * spec.num_heads * spec.head_dim / spec.num_active_parameters("actor")
