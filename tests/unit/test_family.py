"""Configurations of every family: both styles of config.json, what is refused, and how models are cut."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import megarl
from megarl.errors import LayoutError, WeightMapError
from megarl.models.family import FAMILIES, Mixture, check_layout, padded_vocab, read_spec, spec_from_hf_config, stage_layers
from megarl.models.spec import Window

LLAMA_4 = {  # as transformers 4 wrote it
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
LLAMA_5 = {key: value for key, value in LLAMA_4.items() if not key.startswith("rope")} | {
    "rope_parameters": LLAMA_4["rope_scaling"] | {"rope_theta": 500000.0}
}
QWEN2 = {key: value for key, value in LLAMA_4.items() if not key.startswith("rope")} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": 32768,
}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32, "attention_bias": False}
MISTRAL = LLAMA_5 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
GEMMA3 = {
    key: value for key, value in LLAMA_4.items() if key not in ("hidden_act", "rope_theta", "rope_scaling", "tie_word_embeddings")
} | {
    "architectures": ["Gemma3ForCausalLM"],  # as transformers 4 wrote it
    "model_type": "gemma3_text",
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 64,
    "sliding_window": 16,
    "sliding_window_pattern": 3,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
}
MIXTRAL = LLAMA_4 | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
MIXTRAL = {key: value for key, value in MIXTRAL.items() if not key.startswith("rope")}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "norm_topk_prob": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}


def test_both_styles_of_rotary_settings_mean_the_same():
    old, new = spec_from_hf_config(LLAMA_4), spec_from_hf_config(LLAMA_5)
    assert old.rope_theta == new.rope_theta == 500000.0
    assert old.rope_scaling == new.rope_scaling
    assert old.rope_scaling["factor"] == 8.0 and "rope_type" not in old.rope_scaling


def test_every_family_sets_its_switches():
    llama, qwen2, qwen3 = (spec_from_hf_config(values) for values in (LLAMA_4, QWEN2, QWEN3))
    assert (llama.qkv_bias, llama.qk_norm, llama.head_dim) == (False, False, 16)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.rope_scaling) == (True, False, None)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 32)
    mixtral, qwen3_moe = (spec_from_hf_config(values) for values in (MIXTRAL, QWEN3_MOE))
    assert (mixtral.mixture, mixtral.ffn_size, mixtral.rope_theta) == (Mixture(8, 2, True), 96, 1000000.0)
    assert (qwen3_moe.mixture, qwen3_moe.ffn_size, qwen3_moe.qk_norm) == (Mixture(16, 4, False), 24, True)
    assert llama.mixture is qwen3.mixture is None
    mistral, gemma3 = (spec_from_hf_config(values) for values in (MISTRAL | {"sliding_window": 32}, GEMMA3))
    assert mistral.window == Window(32, (True, True, True)) and not mistral.fits_transformer_engine
    assert gemma3.window == Window(16, (True, True, False), 10000.0) and gemma3.rope_theta == 1000000.0
    assert (gemma3.tied, gemma3.embedding_scale, gemma3.softmax_scale, gemma3.output_norms) == (True, 8.0, 0.125, True)
    assert [spec.family for spec in (llama, mistral, qwen2, qwen3, gemma3, mixtral, qwen3_moe)] == list(FAMILIES)


@pytest.mark.parametrize(("size", "expected"), [(None, None), (128, None), (4096, None), (127, 127), ("missing", None)])
def test_a_window_counts_where_it_is_smaller_than_the_context(size, expected):
    values = MISTRAL if size == "missing" else MISTRAL | {"sliding_window": size}
    window = spec_from_hf_config(values).window
    assert (window and window.num_tokens) == expected
    long = spec_from_hf_config(values | {"max_position_embeddings": 32768}).window
    assert (long and long.num_tokens) == (4096 if size == "missing" else size), "Mistral's window is 4096 where no key names it"
    assert spec_from_hf_config(MIXTRAL | {"sliding_window": 32}).window == Window(32, (True,) * 3)


def test_both_styles_of_gemma_3_mean_the_same():
    new = {key: value for key, value in GEMMA3.items() if not key.startswith(("rope", "sliding_window_p"))} | {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    old, new = spec_from_hf_config(GEMMA3), spec_from_hf_config(new)
    assert replace(old, hf_config={}) == replace(new, hf_config={})
    assert spec_from_hf_config({**GEMMA3, "sliding_window_pattern": None}).window.layers == (True,) * 3, "every sixth is global"


@pytest.mark.parametrize(
    ("values", "changes", "words"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9; expected at most the 8 of num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 1}, "nothing to learn"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is None"),
    ],
)
def test_mixtures_that_are_not_computed_are_refused(values, changes, words):
    with pytest.raises(WeightMapError, match=words):
        spec_from_hf_config({"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE}[values] | changes)


def test_both_names_of_the_number_of_experts_are_read():
    older = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"} | {"num_local_experts": 16}
    assert spec_from_hf_config(older).mixture == spec_from_hf_config(QWEN3_MOE).mixture


def test_a_token_meets_some_of_the_parameters():
    """Sizes of Qwen3-30B-A3B: 30.5 billion parameters, 3.35 of them for each token."""
    spec = spec_from_hf_config(
        QWEN3_MOE | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936}
    )  # fmt: skip
    assert round(spec.num_parameters("actor") / 1e9, 1) == 30.5 and round(spec.num_active_parameters("actor") / 1e9, 2) == 3.35
    dense = spec_from_hf_config(QWEN3)
    assert dense.num_active_parameters("actor") == dense.num_parameters("actor") and dense.num_expert_parameters() == 0


def test_a_spec_survives_its_serial_form():
    spec = spec_from_hf_config(QWEN3)
    assert spec_from_hf_config(json.loads(json.dumps(spec.hf_config))) == spec


def test_a_missing_head_count_means_one_head_a_query():
    values = {key: value for key, value in LLAMA_4.items() if key != "num_key_value_heads"}
    assert spec_from_hf_config(values).num_kv_heads == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (LLAMA_4 | {"auto_map": {"AutoModel": "modeling.Own"}}, "auto_map"),
        (LLAMA_4 | {"model_type": "mamba"}, "'mamba'; megarl has tables for llama, mistral, qwen2"),
        (LLAMA_4 | {"model_type": "mamba"}, "to add one, a file in megarl/models, see docs/adding_a_model.md"),
        (LLAMA_4 | {"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        (LLAMA_4 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        (LLAMA_4 | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        (LLAMA_4 | {"rope_scaling": 2.0}, "expected a mapping"),
        (LLAMA_4 | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA_4 | {"attention_bias": True}, "attention_bias"),
        (LLAMA_4 | {"mlp_bias": True}, "mlp_bias"),
        (LLAMA_4 | {"attention_dropout": 0.1}, "attention_dropout"),
        (LLAMA_4 | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA_4 | {"hidden_size": "64"}, "hidden_size is '64'"),
        (LLAMA_4 | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (LLAMA_4 | {"vocab_size": None}, "vocab_size is None"),
        (LLAMA_4 | {"num_key_value_heads": 3}, "does not divide num_attention_heads"),
        (LLAMA_4 | {"num_attention_heads": 5, "num_key_value_heads": 5}, "does not divide hidden_size"),
        (QWEN2 | {"use_sliding_window": True}, "use_sliding_window"),
        (
            QWEN2 | {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            "holds 'sliding_attention' for layer 2; megarl computes full",
        ),
        (QWEN2 | {"layer_types": ["full_attention"]}, "layer_types names 1 layers; num_hidden_layers is 3"),
        (MISTRAL | {"sliding_window": "5"}, "sliding_window is '5'"),
        (GEMMA3 | {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        (GEMMA3 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3 | {"layer_types": ["sliding_attention"]}, "layer_types names 1 layers"),
        (GEMMA3 | {"layer_types": ["chunked_attention"] * 3}, "'chunked_attention' for layer 0; megarl computes full_attention there"),
        (GEMMA3 | {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type linear lacks factor"),
        (GEMMA3 | {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "'longrope'"),
        (GEMMA3 | {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "yarn"}}}, "'yarn'"),
        (GEMMA3 | {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}, "'gemma3'"),
        (QWEN3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_the_models_do_not_compute_is_refused(values, words):
    with pytest.raises(WeightMapError) as refusal:
        spec_from_hf_config(values, where="here/config.json")
    assert words in str(refusal.value) and "here/config.json" in str(refusal.value)


def test_a_directory_is_refused_in_one_line(tmp_path):
    with pytest.raises(WeightMapError, match="cannot be read"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightMapError, match="is not JSON"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightMapError, match="expected a JSON object"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_4))
    assert read_spec(tmp_path) == spec_from_hf_config(LLAMA_4)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "sequence", "words"),
    [
        (3, 1, False, "parallel.tensor is 3 but the model's attention heads are 4"),
        (1, 4, False, "parallel.pipeline is 4 but the model has 3 layers"),
        (1, 1, True, "parallel.sequence"),
    ],
)
def test_a_cut_that_does_not_fit_the_model_is_refused(tensor, pipeline, sequence, words):
    with pytest.raises(LayoutError, match=words):
        check_layout(spec_from_hf_config(LLAMA_4), tensor, pipeline, sequence)


def test_cuts_that_fit_pass():
    spec = spec_from_hf_config(LLAMA_4)
    for tensor, pipeline in ((1, 1), (2, 2), (4, 3)):
        check_layout(spec, tensor, pipeline, sequence=tensor > 1)


def test_layers_and_vocabulary_are_cut_whole():
    assert stage_layers(3, 2) == (2, 1)
    assert stage_layers(80, 4) == (20, 20, 20, 20)
    for tensor in (1, 2, 8):
        padded = padded_vocab(101, tensor)
        assert padded >= 101 and padded % (64 * tensor) == 0 and padded - 101 < 64 * tensor


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (None, None, ()),
        (7, None, (7,)),
        ([7, 9], None, (7, 9)),
        (7, {"eos_token_id": 7}, (7,)),
        (7, {"eos_token_id": [9, 7]}, (7, 9)),
        (None, {"eos_token_id": [9, 7]}, (9, 7)),
        (7, {"do_sample": True}, (7,)),
        (7, [], (7,)),
    ],
)
def test_end_tokens_are_those_of_both_files(tmp_path, config, generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_4 | {"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    spec = read_spec(tmp_path)
    assert spec.end_ids == expected
    assert spec_from_hf_config(spec.hf_config).end_ids == expected, "a checkpoint keeps them"


def test_the_family_in_the_guide_is_the_file():
    root = Path(megarl.__file__).parent
    guide = (root.parent / "docs" / "adding_a_model.md").read_text()
    assert f"```python\n{(root / 'models' / 'mistral.py').read_text()}```" in guide
