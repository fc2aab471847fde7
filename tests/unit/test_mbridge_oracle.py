"""The weight tables against an independent project: mbridge places every row of every tensor where they do, in both directions.

mbridge (Apache-2.0) is another bridge between Megatron-Core and Hugging Face. Its names and formats of single tensors are plain functions,
which work without Transformer Engine. They speak of the names that Transformer Engine's layers give.
"""

import pytest
import torch

from megarl.models.family import spec_from_hf_config
from megarl.models.spec import ModelSpec, WeightTable
from megarl.parallel import device
from tests.tiny_hf import KINDS, MIXTURES, tiny_config
from tests.unit.test_family_table import positions

TEACHERS = {"mistral": "llama"}  # the same names
ACTORS = [kind for kind in KINDS | MIXTURES if not kind.endswith("critic")]


@pytest.fixture(scope="module")
def registry() -> dict[str, type]:
    device.prepare()
    pytest.importorskip("mbridge", reason="mbridge is not installed: bash launch/install.sh --dev")
    from mbridge.core.bridge import _MODEL_REGISTRY

    return _MODEL_REGISTRY


@pytest.mark.parametrize("kind", ACTORS)
def test_mbridge_places_every_row_alike(registry, kind):
    from mbridge.core.parallel_states import ParallelStates

    config = tiny_config(kind)
    spec = spec_from_hf_config(config.to_dict())
    family = TEACHERS.get(spec.family, spec.family)
    if family not in registry:
        pytest.skip(f"mbridge has no map for {family}")
    config.head_dim = spec.head_dim  # mbridge does not compute a missing one
    teacher = registry[family](config, dtype=torch.float32, parallel_states=ParallelStates())
    table, generator = spec.table("actor"), torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in table.hf_shapes.items()}
    met = set()
    for key in table.entries:
        for indices in positions(key, spec):
            name = transformer_engine_name(key, indices, spec)
            ours = gathered(table, key, indices, weights)
            parts = teacher._weight_name_mapping_mcore_to_hf(name)
            assert torch.equal(teacher._weight_to_mcore_format(name, [weights[part] for part in parts]), ours), name
            for part, tensor in zip(*teacher._weight_to_hf_format(name, ours), strict=True):
                assert torch.equal(tensor, weights[part]), f"{part} of {name}"
                met.add(part)
    assert met == set(table.hf_shapes)


def gathered(table: WeightTable, key: str, indices: tuple[int, ...], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The whole Megatron tensor that the table makes of Hugging Face's."""
    return torch.cat([weights[rows.hf_name][rows.hf_row : rows.hf_row + rows.num_rows] for rows in table.segments(key, indices)])


def transformer_engine_name(key: str, indices: tuple[int, ...], spec: ModelSpec) -> str:
    """The parameter that Transformer Engine's layers hold under a canonical key: experts are numbered weights of grouped products."""
    if not indices:
        return key
    key = key.replace("decoder.layers.", f"decoder.layers.{indices[0]}.")
    if spec.mixture is not None:
        key = key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    return key if len(indices) == 1 else key.replace("experts.experts.", "experts.") + str(indices[1])
