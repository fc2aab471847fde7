"""Hugging Face directories: `--check` takes those of every family; weights that are not the table's are refused in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.check import inspect
from megarl.checkpoint.hf_import import import_hf
from megarl.checkpoint.sources import open_weights
from megarl.errors import WeightMapError
from megarl.planner.devices import GPUS, Assumptions
from megarl.planner.memory import plan_memory
from tests.tiny_hf import KINDS, MIXTURES, save_tiny, tiny_config
from tests.unit.tiny_run import write_run

NORM = "model.layers.0.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return {kind: save_tiny(kind, tmp_path_factory.mktemp("models")) for kind in ("mistral", "gemma3", "gemma3-critic")}


def changed(original, folder, change) -> None:
    folder.mkdir()
    (folder / "config.json").write_text((original / "config.json").read_text())
    tensors = load_file(original / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def biases(tensors) -> None:
    for name in "qk":
        tensors[f"model.layers.0.self_attn.{name}_proj.bias"] = torch.zeros(64)


def spare(tensors) -> None:
    tensors |= {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
    }


CHANGES = {
    "a tensor that no rule covers": (
        biases,
        r"hold model\.layers\.0\.self_attn\.k_proj\.bias and 1 more, which the table of gemma3_text does not list: .*megarl/models",
    ),
    "a rule without its tensor": (lambda tensors: tensors.pop(NORM), rf"model\.safetensors: tensor {NORM} is missing; .*config\.json"),
    "another shape": (lambda tensors: tensors.update({NORM: torch.ones(63)}), rf"{NORM} has shape \[63\]; config\.json .* \[64\]"),
    "whole numbers": (
        lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int8)}),
        rf"{NORM} is stored as torch\.int8; expected floating-point numbers",
    ),
    "eight bits": (
        lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.float8_e4m3fn)}),
        rf"{NORM} is stored as F8_E4M3; expected .*BF16.*: save the model without quantisation",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_are_not_the_tables_are_refused(original, tmp_path, name):
    change, words = CHANGES[name]
    changed(original["gemma3"], tmp_path / "hf", change)
    for use in (lambda: open_weights(tmp_path / "hf", "actor"), lambda: open_weights(tmp_path / "hf", "critic")):
        with pytest.raises(WeightMapError, match=words) as refusal:
            use()
        assert "\n" not in str(refusal.value) and str(tmp_path / "hf") in str(refusal.value)
    with pytest.raises(WeightMapError, match=words):
        import_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "role"), [("mistral", "actor"), ("mistral", "critic"), ("gemma3", "critic"), ("gemma3-critic", "reward")])
def test_what_belongs_to_a_checkpoint_passes(original, tmp_path, kind, role):
    changed(original[kind], tmp_path / "hf", spare if kind == "gemma3" else lambda tensors: None)
    spec, source = open_weights(tmp_path / "hf", role)
    assert spec.table("actor" if role == "actor" else "critic").hf_shapes.keys() <= set(source.names())


@pytest.mark.parametrize("kind", [kind for kind in KINDS | MIXTURES if not kind.endswith("critic")])
def test_check_accepts_every_family(tmp_path, kind):
    path = write_run(tmp_path)
    for model in ("actor", "critic"):
        values = tiny_config(kind).to_dict() | {"vocab_size": 120}
        (tmp_path / model / "config.json").write_text(json.dumps(values))
    overrides = ["parallel.sequence=true", "parallel.expert=2"] if kind in MIXTURES else []
    inspection = inspect("ppo", path, overrides)
    spec = inspection.specs["actor"]
    (model, *_) = plan_memory(inspection.run, inspection.specs, inspection.layout, GPUS["h100-80gb"], Assumptions()).models
    assert spec.family == tiny_config(kind).model_type and model.spec == spec and min(owned.weights for owned in model.owned) > 0
