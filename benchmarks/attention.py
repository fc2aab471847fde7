"""Our core attention (torch's SDPA) against Megatron's local one (DotProductAttention), forward and backward, alternating in one run.

`python -m benchmarks.attention [--quick] [--json PATH]`

Both get the same queries, keys and values of one layer. Megatron's core writes out scores and probabilities, [B, heads, S, S] each;
ours does not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import alternating, main
from megarl.config import ParallelConfig
from megarl.models.attention import CausalAttention
from megarl.parallel import device, groups

device.prepare()

from megatron.core.transformer import TransformerConfig  # noqa: E402  (the host is prepared first)
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

TARGET = 2.0  # SDPA over Megatron's core at 1024 tokens


@dataclass(frozen=True)
class Shape:
    """One layer's attention: B sequences of S tokens, query heads, key-value heads, head size."""

    tokens: int
    sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def config(self) -> TransformerConfig:
        return TransformerConfig(
            num_layers=1,
            hidden_size=self.heads * self.head_dim,
            num_attention_heads=self.heads,
            num_query_groups=self.kv_heads,
            kv_channels=self.head_dim,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            masked_softmax_fusion=False,
            bf16=self.dtype == torch.bfloat16,
            params_dtype=self.dtype,
            use_cpu_initialization=not device.is_cuda(),
        )

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        drawn = (torch.randn(self.tokens, self.sequences, n, self.head_dim, generator=generator) for n in heads)
        return [tensor.to(device.device(), self.dtype).requires_grad_() for tensor in drawn]


def forward_backward(attend: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """One pass in both directions, to its end."""
    for tensor in inputs:
        tensor.grad = None
    output = attend(*inputs)
    output.backward(torch.ones_like(output))
    device.synchronize()


def row(shape: Shape, repeats: int) -> dict[str, Any]:
    """Seconds of both, medians of alternating passes, after a look whether both say the same."""
    settings = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    ours, megatron = CausalAttention(shape.config(), **settings), DotProductAttention(shape.config(), **settings)
    future = torch.ones(1, 1, shape.tokens, shape.tokens, dtype=torch.bool, device=device.device()).triu(1)
    inputs = shape.inputs()
    contenders = {"megatron": lambda q, k, v: megatron(q, k, v, future), "sdpa": ours}
    with torch.no_grad():
        expected, found = (attend(*inputs).float() for attend in contenders.values())
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference < (1e-5 if shape.dtype == torch.float32 else 3e-2), difference
    seconds = alternating({name: lambda attend=attend: forward_backward(attend, inputs) for name, attend in contenders.items()}, repeats)
    return {
        "tokens": shape.tokens,
        "sequences": shape.sequences,
        "heads": f"{shape.heads}/{shape.kv_heads} x {shape.head_dim}",
        "dtype": str(shape.dtype).removeprefix("torch."),
        "megatron_ms": 1e3 * seconds["megatron"],
        "sdpa_ms": 1e3 * seconds["sdpa"],
        "ratio": seconds["megatron"] / seconds["sdpa"],
        "difference": difference,
    }


def measure(quick: bool) -> Mapping[str, Any]:
    groups.initialize(ParallelConfig(), seed=0)
    wide = (32, 8, 128) if device.is_cuda() else (8, 4, 64)
    dtypes = [torch.bfloat16] if device.is_cuda() else [torch.float32, torch.bfloat16]
    lengths = [1024] if quick else [256, 1024, 2048]
    rows = [row(Shape(tokens, 4 if device.is_cuda() else 1, *wide, dtype), 5 if quick else 11) for dtype in dtypes for tokens in lengths]
    at_1k = [r["ratio"] for r in rows if r["tokens"] == 1024]
    groups.shutdown()
    return {
        "attention": rows,
        "device": device.device().type if not device.is_cuda() else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "ratio_at_1k": min(at_1k),
        "target": TARGET,
    }


if __name__ == "__main__":
    main("attention", __doc__.splitlines()[0], measure)
