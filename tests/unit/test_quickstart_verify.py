"""The quickstart's verification sees an export that is not what was trained."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megarl.quickstart.verify import max_abs_difference
from megarl.records import TokenBatch


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return LlamaForCausalLM(config).eval()


def test_one_changed_weight_is_seen(model: LlamaForCausalLM) -> None:
    sequences = TokenBatch(torch.randint(32, (3, 6)), torch.tensor([6, 4, 5]))
    with torch.no_grad():
        trained = model(sequences.token_ids).logits
        assert max_abs_difference(model, sequences, trained) == 0.0
        weight = model.model.layers[1].mlp.down_proj.weight
        weight[0, 0] += 0.5
        assert max_abs_difference(model, sequences, trained) > 1e-4
        weight[0, 0] -= 0.5


def test_padding_does_not_count(model: LlamaForCausalLM) -> None:
    sequences = TokenBatch(torch.randint(32, (2, 5)), torch.tensor([5, 3]))
    with torch.no_grad():
        trained = model(sequences.token_ids).logits
    trained[1, 3:] += 1.0
    assert max_abs_difference(model, sequences, trained) == 0.0
    trained[1, 2] += 1.0
    assert max_abs_difference(model, sequences, trained) == pytest.approx(1.0, abs=1e-5)
