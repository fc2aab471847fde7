"""The weight tables: every element of every Hugging Face tensor has exactly one place, and names are transformers' own."""

import pytest
import torch

from megarl.errors import WeightMapError
from megarl.models.family import spec_from_hf_config
from megarl.models.random_weights import RandomSource
from tests.tiny_hf import KINDS, MIXTURES, as_on_disk, tiny_config

GLOBAL_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight")


def tables() -> list:
    found = []
    for kind in KINDS | MIXTURES:
        spec = spec_from_hf_config(tiny_config(kind).to_dict())
        role = "critic" if kind.endswith("critic") else "actor"
        found.append(pytest.param(kind, spec, spec.table(role), id=kind))
    return found


@pytest.mark.parametrize(("kind", "spec", "table"), tables())
def test_names_and_shapes_are_those_of_transformers(kind, spec, table):
    import transformers

    classes = transformers.AutoModelForSequenceClassification if kind.endswith("critic") else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = classes.from_config(tiny_config(kind))
    named = as_on_disk(dict(model.named_parameters()), model.config.model_type)
    assert table.hf_shapes == {name: tuple(parameter.shape) for name, parameter in named.items()}


@pytest.mark.parametrize(("kind", "spec", "table"), tables())
def test_every_row_of_every_tensor_has_exactly_one_place(kind, spec, table):
    counts = {name: torch.zeros(shape[0], dtype=torch.int) for name, shape in table.hf_shapes.items()}
    for key in table.entries:
        taken = set()
        for indices in positions(key, spec):
            for rows in table.segments(key, indices):
                counts[rows.hf_name][rows.hf_row : rows.hf_row + rows.num_rows] += 1
                places = {(indices, row) for row in range(rows.row, rows.row + rows.num_rows)}
                assert not places & taken, f"{key}: two tensors in one row"
                taken |= places
    assert all(bool((count == 1).all()) for count in counts.values()), [n for n, c in counts.items() if not bool((c == 1).all())]


def positions(key: str, spec) -> list[tuple[int, ...]]:
    """Every position on the axes that Megatron puts in front of this tensor."""
    if key in GLOBAL_KEYS:
        return [()]
    if ".experts." in key:
        return [(layer, expert) for layer in range(spec.num_layers) for expert in range(spec.mixture.num_experts)]
    return [(layer,) for layer in range(spec.num_layers)]


def test_the_fused_projection_goes_group_by_group():
    spec = spec_from_hf_config(tiny_config("llama").to_dict())  # 4 query heads and 2 key-value heads of 16
    rows = [(r.row, r.num_rows, r.hf_name.split(".")[-2][0], r.hf_row) for r in spec.table("actor").segments(
        "decoder.layers.self_attention.linear_qkv.weight", (1,)
    )]  # fmt: skip
    assert rows == [(0, 32, "q", 0), (32, 16, "k", 0), (48, 16, "v", 0), (64, 32, "q", 32), (96, 16, "k", 16), (112, 16, "v", 16)]


def test_the_norm_before_a_mixture_has_two_names():
    table = spec_from_hf_config(tiny_config("mixtral").to_dict()).table("actor")
    keys = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    fused, alone = (table.segments(f"decoder.layers.{key}", (1,)) for key in keys)
    assert fused == alone and alone[0].hf_name == "model.layers.1.post_attention_layernorm.weight"


def test_an_unknown_key_is_refused():
    table = spec_from_hf_config(tiny_config("llama").to_dict()).table("actor")
    with pytest.raises(WeightMapError, match=r"router\.weight"):
        table.segments("decoder.layers.mlp.router.weight", (0,))


def test_roles_differ_in_the_head_alone():
    spec = spec_from_hf_config(tiny_config("llama").to_dict())
    actor, critic = spec.table("actor").hf_shapes, spec.table("critic").hf_shapes
    assert set(actor) - set(critic) == {"lm_head.weight"} and set(critic) - set(actor) == {"score.weight"}
    assert critic["score.weight"] == (1, spec.hidden_size)
    tied = spec_from_hf_config(tiny_config("qwen3-tied").to_dict())
    assert "lm_head.weight" not in tied.table("actor").hf_shapes and "score.weight" in tied.table("critic").hf_shapes
    assert spec.num_parameters("actor") - spec.num_parameters("critic") == (spec.vocab_size - 1) * spec.hidden_size


def test_random_weights_are_a_function_of_seed_and_name():
    table = spec_from_hf_config(tiny_config("qwen2").to_dict()).table("actor")
    name = "model.layers.1.mlp.up_proj.weight"
    whole = tuple((0, size) for size in table.hf_shapes[name])
    first, again, other = (RandomSource(table, seed) for seed in (7, 7, 8))
    again.read("lm_head.weight", ((0, 1), (0, 64)))  # what was read before makes no difference
    full = first.read(name, whole)
    assert torch.equal(full, again.read(name, whole)) and not torch.equal(full, other.read(name, whole))
    assert torch.equal(again.read(name, ((3, 5), (10, 20))), full[3:8, 10:30])
    assert abs(full.std().item() - 0.02) < 0.002
    assert torch.equal(first.read("model.norm.weight", ((0, 64),)), torch.ones(64))
    gemma = spec_from_hf_config(tiny_config("gemma3").to_dict()).table("actor")
    assert not RandomSource(gemma, 7).read("model.layers.1.post_feedforward_layernorm.weight", ((0, 64),)).any(), "its norms add one"
    assert torch.equal(first.read("model.layers.0.self_attn.q_proj.bias", ((0, 64),)), torch.zeros(64))


def test_random_weights_spread_as_the_config_says():
    spec = spec_from_hf_config({**tiny_config("llama").to_dict(), "initializer_range": 0.1})
    drawn = RandomSource(spec.table("actor"), 0, spec.standard_deviation).read("lm_head.weight", ((0, spec.vocab_size), (0, 64)))
    assert abs(drawn.std().item() - 0.1) < 0.01
    assert spec_from_hf_config({**tiny_config("llama").to_dict(), "initializer_range": None}).standard_deviation == 0.02
