"""Attention of local layers, taken window by window, is attention under the whole mask: padded, packed, and from later positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.models.attention import CausalAttention
from megarl.models.rotary import frequencies_of_layer, rotary_frequencies
from megarl.models.spec import Window
from tests.unit.test_family import GEMMA3, spec_from_hf_config


def make_attention(window: int | None) -> CausalAttention:
    """Layer 2 of three is local."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    config = TransformerConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=2,
        attention_dropout=0.0,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None if window is None else [0, 1, 0],
    )
    return CausalAttention(config, 2, AttnMaskType.causal, "self")


def under_mask(query, key, value, window: int):
    """Every query against every key, in a plain softmax; the queries are the last positions."""
    positions = torch.arange(len(key))
    back = positions[-len(query) :, None] - positions
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill((back < 0) | (back >= window), float("-inf"))
    return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value).flatten(2)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_windows_one_after_the_other_are_the_whole_mask(num_keys, window, draw):
    num_queries = draw.draw(st.integers(1, num_keys))  # a later chunk under context parallelism
    key, value = (torch.randn(num_keys, 2, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    query = torch.randn(num_queries, 2, 2, 8, generator=torch.Generator().manual_seed(3))
    found = make_attention(window)._attend(query, key, value)
    assert torch.allclose(found, under_mask(query, key, value, window), atol=1e-6)


def test_packed_sequences_keep_their_windows_apart():
    from megarl.parallel.microbatches import PackedSequences

    parts = [torch.randn(length, 1, 2, 8, generator=torch.Generator().manual_seed(length)) for length in (7, 3, 12)]
    whole = torch.cat(parts)
    packed = make_attention(4)(whole, whole, whole, packed_seq_params=PackedSequences(segments=(7, 3, 12)))
    assert torch.allclose(packed, torch.cat([under_mask(part, part, part, 4) for part in parts]), atol=1e-6)


def test_other_layers_see_everything():
    sequence = torch.randn(9, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    local, everywhere = make_attention(4), make_attention(None)
    assert local.window == 4 and everywhere.window is None
    assert not torch.allclose(local(sequence, sequence, sequence), everywhere(sequence, sequence, sequence), atol=1e-3)


@pytest.mark.parametrize(("is_local", "theta"), [(False, 1e6), (True, 1e4)])
def test_a_layer_takes_the_frequencies_of_its_kind(is_local, theta):
    spec = spec_from_hf_config(GEMMA3)
    assert isinstance(spec.window, Window)
    angles = torch.arange(5)[:, None] * rotary_frequencies(spec)
    repeated = torch.cat((angles, angles), dim=-1)[:, None, None]  # as Megatron's rotary embedding gives them
    expected = torch.arange(5)[:, None] * theta ** (-torch.arange(0, 32, 2) / 32)
    assert torch.allclose(frequencies_of_layer(repeated, is_local)[:, 0, 0], torch.cat((expected, expected), dim=-1), rtol=1e-5)
