"""Core attention through torch's `scaled_dot_product_attention`, for hosts without Transformer Engine.

Causal attention over right-padded sequences needs no mask: a token never looks at the padding behind it, and what padding looks at
is read by nobody.

Under context parallelism every rank gathers the keys and values of whole sequences and attends from its own queries, which lie in two
chunks (`parallel.context`); all ranks then do the same work.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.parallel import context, device
from megarl.parallel.microbatches import PackedSequences

device.prepare()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402  (the host is prepared first)
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402


class CausalAttention(torch.nn.Module):
    """Megatron's core-attention interface; causal self-attention with grouped queries and nothing else.

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
            "a sliding window": config.window_size is not None,
            "a softmax offset": config.softmax_type != "vanilla",
        }.items():
            if is_asked:
                raise NotImplementedError(f"CausalAttention does not compute {feature}")
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(D)
        self.context = config.context_parallel_size

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
        if packed_seq_params is not None:
            if self.context > 1:
                raise NotImplementedError("CausalAttention takes no packed sequences under context parallelism")
            parts = (heads.split(packed_seq_params.segments) for heads in (query, key, value))
            return torch.cat([self._attend(*part) for part in zip(*parts, strict=True)])
        if self.context == 1:
            return self._attend(query, key, value)
        key, value = context.gathered_for_attention(torch.cat([key, value], dim=-1)).split([key.shape[-1], value.shape[-1]], dim=-1)
        rank, half = context.rank(), len(query) // 2
        attended = []
        for chunk, queries in ((rank, query[:half]), (2 * self.context - 1 - rank, query[half:])):
            seen = (chunk + 1) * half
            attended.append(self._attend(queries, key[:seen], value[:seen]))
        return torch.cat(attended)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The queries are the last positions of the keys: query i of n looks at the keys up to i + (number of keys) - n."""
        num_queries, num_keys = len(query), len(key)
        is_square = num_queries == num_keys
        sees = None if is_square else query.new_ones((num_queries, num_keys), dtype=torch.bool).tril(num_keys - num_queries)
        attended = F.scaled_dot_product_attention(
            *(heads.permute(1, 2, 0, 3) for heads in (query, key, value)),
            attn_mask=sees,
            is_causal=is_square,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.permute(2, 0, 1, 3).flatten(2).contiguous()
