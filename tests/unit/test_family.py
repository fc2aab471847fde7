"""Configurations of every family: both styles of config.json, what is refused, and how models are cut."""

import json

import pytest

from megarl.errors import LayoutError, WeightMapError
from megarl.models.family import FAMILIES, check_layout, padded_vocab, read_spec, spec_from_hf_config, stage_layers

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
    assert [spec.family for spec in (llama, qwen2, qwen3)] == list(FAMILIES)


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
        (LLAMA_4 | {"model_type": "mamba"}, "'mamba'; megarl has tables for llama, qwen2, qwen3"),
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
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
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
