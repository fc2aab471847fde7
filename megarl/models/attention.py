"""Core attention through torch's `scaled_dot_product_attention`, for layers without Transformer Engine.

Causal attention over right-padded sequences needs no mask: a token never looks at the padding behind it, and what padding looks at
is read by nobody.

Under context parallelism every rank gathers the keys and values of whole sequences and attends from its own queries, which lie in two
chunks (`parallel.context`); all ranks then do the same work.

A local layer's queries look back at a window of keys. They are taken window by window, so that work and memory grow with the sequence, not
with its square.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.models.rotary import frequencies_of_layer
from megarl.parallel import context, device
from megarl.parallel.microbatches import PackedSequences

device.prepare()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402  (the host is prepared first)
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.attention import SelfAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.utils import is_layer_window_attention  # noqa: E402


def window_of_layer(config: TransformerConfig, layer_number: int) -> int | None:
    """How many tokens a token of this layer (counted from 1) sees, itself included; None: all before it."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    return config.window_size[0] + 1


class LocalRotaryAttention(SelfAttention):
    """Megatron's self-attention in a model whose local layers have rotary frequencies of their own: each layer takes those of its kind."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *, rotary_pos_emb: Tensor, **kwargs) -> tuple[Tensor, None]:
        """hidden_states [S, B, H] and the angles of both kinds [S, 1, 1, 2 * head_dim] -> [S, B, H] and no bias."""
        is_local = window_of_layer(self.config, self.layer_number) is not None
        return super().forward(hidden_states, attention_mask, rotary_pos_emb=frequencies_of_layer(rotary_pos_emb, is_local), **kwargs)


class CausalAttention(torch.nn.Module):
    """Megatron's core-attention interface; causal self-attention with grouped queries and windows and nothing else.

    Axis letters: S positions of this rank, B sequences, N query heads and G key-value heads of this rank, D head size.
    Raises `NotImplementedError` for every feature of the interface that it does not compute.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        for feature, is_asked in {
            "a mask other than causal": attn_mask_type != AttnMaskType.causal,
            "cross-attention": attention_type != "self",
            "attention dropout": dropout != 0,
            "query-key layer scaling": config.apply_query_key_layer_scaling,
            "a softmax offset": config.softmax_type != "vanilla",
        }.items():
            if is_asked:
                raise NotImplementedError(f"CausalAttention does not compute {feature}")
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(D)
        self.context = config.context_parallel_size
        self.window = window_of_layer(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D].

        With `packed_seq_params` B is 1, and attention stays inside each of the sequences that follow each other along S.
        """
        if attention_mask is not None or attention_bias is not None:
            raise NotImplementedError("CausalAttention takes no mask or bias")
        if attn_mask_type not in (None, AttnMaskType.causal):
            raise NotImplementedError(f"CausalAttention does not compute {attn_mask_type}")
        segments = (len(query) * self.context,) if packed_seq_params is None else packed_seq_params.segments
        if self.context == 1:
            return self._attend_segments(query, 0, key, value, segments)
        key, value = context.gathered_for_attention(torch.cat([key, value], dim=-1)).split([key.shape[-1], value.shape[-1]], dim=-1)
        rank, half = context.rank(), len(query) // 2
        chunks = ((rank, query[:half]), (2 * self.context - 1 - rank, query[half:]))
        return torch.cat([self._attend_segments(queries, chunk * half, key, value, segments) for chunk, queries in chunks])

    def _attend_segments(self, query: Tensor, start: int, key: Tensor, value: Tensor, segments: Sequence[int]) -> Tensor:
        """The queries are the positions from `start` on; each looks at the keys before it in its own segment of the whole."""
        attended, first = [], 0
        for length in segments:
            begin, end = max(first, start), min(first + length, start + len(query))
            if begin < end:
                attended.append(self._attend(query[begin - start : end - start], key[first:end], value[first:end]))
            first += length
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The queries are the last positions of the keys: query i of n looks at the keys up to i + (number of keys) - n."""
        if self.window is None or len(key) <= self.window:
            return self._attend_up_to(query, key, value)
        parts, end = [], len(key) - len(query)
        for queries in query.split(self.window):
            end += len(queries)
            start = max(0, end - len(queries) - self.window + 1)
            parts.append(self._attend_up_to(queries, key[start:end], value[start:end]))
        return torch.cat(parts)

    def _attend_up_to(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        num_queries, num_keys = len(query), len(key)
        before = num_keys - num_queries
        is_bounded = self.window is not None and num_keys > self.window
        is_square = before == 0 and not is_bounded
        sees = None if is_square else query.new_ones((num_queries, num_keys), dtype=torch.bool).tril(before)
        if is_bounded:
            sees = sees.triu(before - self.window + 1)
        attended = F.scaled_dot_product_attention(
            *(heads.permute(1, 2, 0, 3) for heads in (query, key, value)),
            attn_mask=sees,
            is_causal=is_square,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.permute(2, 0, 1, 3).flatten(2).contiguous()
