"""Core attention through torch's `scaled_dot_product_attention`, for hosts without Transformer Engine.

Causal attention over right-padded sequences needs no mask: a token never looks at the padding behind it, and what padding looks at
is read by nobody.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.parallel import device

device.prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402  (the host is prepared first)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402


class CausalAttention(torch.nn.Module):
    """Megatron's core-attention interface; causal self-attention with grouped queries and nothing else.

    Axis letters: S positions, B sequences, N query heads and G key-value heads of this rank, D head size.
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
            "context parallelism": config.context_parallel_size != 1,
            "query-key layer scaling": config.apply_query_key_layer_scaling,
            "a sliding window": config.window_size is not None,
            "a softmax offset": config.softmax_type != "vanilla",
        }.items():
            if is_asked:
                raise NotImplementedError(f"CausalAttention does not compute {feature}")
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(D)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D]."""
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("CausalAttention takes no mask, bias or packed sequences")
        if attn_mask_type not in (None, AttnMaskType.causal):
            raise NotImplementedError(f"CausalAttention does not compute {attn_mask_type}")
        attended = F.scaled_dot_product_attention(
            *(heads.permute(1, 2, 0, 3) for heads in (query, key, value)),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.permute(2, 0, 1, 3).flatten(2).contiguous()
