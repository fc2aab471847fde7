"""Bytes of activations: what a layer keeps for its backward, what passes through it, what the head takes. Pure.

`local` layers are Megatron's own with our norm and attention; the numbers are what autograd saves, counted tensor by tensor
(`benchmarks/planner_runs.py` measures bytes of real steps). `fused` layers are Transformer Engine's, counted in the same way from what
its modules save (norm and projection in one, flash attention, SwiGLU from its input).

Axis letters: per token, H hidden width, Q/K/V rows of the projections, F feed-forward width, k experts a token.
"""

from dataclasses import dataclass
from typing import Literal

from megarl.config import ParallelConfig
from megarl.models.spec import ModelSpec, padded_vocab

Kernels = Literal["local", "fused"]


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer for one token of a sequence; a tensor-parallel rank's part. `position` comes once a position, not once a sequence."""

    kept: float  # until its backward
    kept_position: float
    passing: float  # at most at once, in a forward that keeps nothing
    backward: float  # at most on top of what is kept, in its backward


def layer_bytes(spec: ModelSpec, parallel: ParallelConfig, kernels: Kernels, precision: str) -> LayerBytes:
    """Bytes of a layer that keeps everything (`recompute: none`) or all but attention's insides (`selective`)."""
    width = 2 if precision == "bf16" else 4
    tensor, context = parallel.tensor, parallel.context
    outer = tensor if parallel.sequence else 1  # over how many ranks the tokens between the projections are split
    hidden = spec.hidden_size
    queries, keys = spec.num_heads * spec.head_dim / tensor, spec.num_kv_heads * spec.head_dim / tensor
    norms = _norms(spec, kernels, width, hidden / outer, queries, keys)
    log_sums = 0 if parallel.recompute == "selective" else 4 * spec.num_heads / tensor
    if context > 1 and kernels == "local":  # turned queries, keys and values of whole sequences, what two chunks attend to, and that in one
        attention = width * (queries + 2 * keys * context + queries + queries) + log_sums
    else:  # projected, turned, and what they attend to
        attention = width * (queries + 2 * keys + queries + keys + queries) + log_sums
    feed_forward, passing = _feed_forward(spec, kernels, width, tensor, outer)
    rotary = 4 * width * spec.head_dim if kernels == "local" else 0
    gathered = width * hidden if outer > 1 else 0  # whole sequences, on their way into a projection
    residual = 2 * width * hidden / outer
    forward = residual + gathered + max(passing, width * (2 * queries + 2 * keys + 3 * queries), norms / 2)
    backward = residual + gathered + passing
    return LayerBytes(norms + attention + feed_forward, rotary, forward, backward)


def mask_bytes(spec: ModelSpec, parallel: ParallelConfig, kernels: Kernels, precision: str, positions: int) -> float:
    """Of a layer of a microbatch, on average: the masks that `models.attention` hands to torch, kept in the compute type until backward.

    There are none where a square of queries and keys is attended causally.
    """
    if kernels == "fused" or parallel.recompute == "selective":
        return 0.0
    context, own = parallel.context, positions / parallel.context
    whole = 0.0 if context == 1 else (2 * context + 1) * (own / 2) ** 2  # both chunks of a rank, which together see that many keys
    seen, local = (0, 0.0) if spec.window is None else (spec.window.num_tokens, sum(spec.window.layers) / len(spec.window.layers))
    windows = whole if positions <= seen else (own - seen * (context == 1)) * 2 * seen  # a window of queries sees two of keys
    return (2 if precision == "bf16" else 4) * (whole * (1 - local) + windows * local)


def _norms(spec: ModelSpec, kernels: Kernels, width: int, hidden: float, queries: float, keys: float) -> float:
    """Two norms of the layer's inputs, those of query and key heads, those of outputs."""
    if kernels == "fused":
        return 4 * width * hidden + (width * (queries + keys) if spec.qk_norm else 0) + 8
    one = (4 + 2 * width) * hidden + 4  # the input in float32, what the weight multiplies, what the next weight multiplies
    total = 2 * one + (2 * one if spec.output_norms else 0)
    if spec.qk_norm:
        total += (4 + width) * queries + ((4 if width == 2 else 0) + width) * keys
    return total


def _feed_forward(spec: ModelSpec, kernels: Kernels, width: int, tensor: int, outer: int) -> tuple[float, float]:
    """(bytes kept, bytes passing at once). A mixture's experts are whole on a rank, and meet each token k times."""
    parts = 5 if kernels == "local" else 3  # gate and up, [gate activated, up], their product
    if spec.mixture is None:
        inner = width * spec.ffn_size / tensor
        return parts * inner, parts * inner
    chosen = spec.mixture.experts_per_token / outer
    inner = chosen * width * spec.ffn_size
    moved = 2 * chosen * width * spec.hidden_size  # tokens on their way to experts, and back
    routed = (4 * 3 + 1) * spec.mixture.num_experts / outer + (4 if width == 2 else 0) * spec.hidden_size / outer + 24 * chosen
    return (parts + 1) * inner + moved + routed, (parts + 1) * inner + moved + routed


@dataclass(frozen=True)
class Microbatch:
    """The largest microbatch: S positions of `width` sequences side by side, of which the head looks at `selected`."""

    positions: int
    width: int
    selected: int

    @property
    def tokens(self) -> int:
        return self.positions * self.width

    def selected_on(self, context: int) -> int:
        """Those of the context-parallel rank with most: responses may fill both of its chunks while other ranks hold prompts."""
        return self.width * min(-(-self.selected // self.width), self.positions // context)


@dataclass(frozen=True)
class StageActivations:
    """Bytes on a rank of one stage."""

    kept: int  # of all microbatches in flight
    passing: int  # at most at once in a forward pass without gradients
    backward: int  # at most at once on top of `kept`
    ends: int  # of `passing` and `backward`: what is still there while the head computes


def stage_activations(
    spec: ModelSpec,
    parallel: ParallelConfig,
    kernels: Kernels,
    precision: str,
    batch: Microbatch,
    layers_in_flight: float,
    layers_of_chunk: int,
) -> StageActivations:
    """Activations of `layers_in_flight` layers (those of a stage times microbatches) while `batch` is the largest microbatch."""
    width = 2 if precision == "bf16" else 4
    one = layer_bytes(spec, parallel, kernels, precision)
    tokens, positions = batch.tokens / parallel.context, batch.positions / parallel.context
    outer = parallel.tensor if parallel.sequence else 1
    masks = mask_bytes(spec, parallel, kernels, precision, batch.positions)
    whole = one.kept * tokens + one.kept_position * positions + masks
    boundary = width * spec.hidden_size * tokens / outer  # hidden states between layers
    if parallel.recompute == "full":
        kept, working = layers_in_flight * boundary, whole
    else:
        kept, working = layers_in_flight * whole, 0.0
    ends = 3 * boundary  # the stage's input and output, and the next input that arrives meanwhile
    edge = layers_in_flight / max(1, layers_of_chunk) * boundary if width == 2 and parallel.pipeline > 1 else 0.0
    return StageActivations(
        kept=int(kept + edge),
        passing=int(one.passing * tokens + one.kept_position * positions + masks + ends),
        backward=int(working + one.backward * tokens + ends),
        ends=int(ends),
    )


@dataclass(frozen=True)
class HeadBytes:
    """The vocabulary head's bytes on a rank that computes a share of it."""

    forward: int
    backward: int
    replica: int  # of the weight and its float32 gradient where another stage owns it, while learning
    replica_forward: int


def head_bytes(spec: ModelSpec, parallel: ParallelConfig, precision: str, batch: Microbatch, num_shares: int) -> HeadBytes:
    """Logits in slices of at most `parallel.logits_bytes`, the hidden states they come from, the weight's gradient."""
    width = 2 if precision == "bf16" else 4
    columns = padded_vocab(spec.vocab_size, parallel.tensor) // parallel.tensor
    weight = columns * spec.hidden_size
    selected = -(-batch.selected_on(parallel.context) // num_shares)
    rows = max(1, min(selected, parallel.logits_bytes // (4 * columns)))
    slices = -(-selected // rows)
    hidden = width * selected * spec.hidden_size  # backward: and its gradient
    logits = 8 * rows * columns  # float32, once as they are and once as probabilities
    cast = width * rows * columns if width == 2 else 0
    gradient = weight * ((4 if slices > 1 else width) + width)
    return HeadBytes(hidden + logits, 2 * hidden + logits + cast + gradient, weight * (width + 4), weight * width)
