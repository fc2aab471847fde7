"""Every element of every Hugging Face tensor has one owner under every layout, and comes back as it went in: for all families.

The ranks are simulated: one process builds the Megatron model of each of them in turn, on torch's fake process groups, which know who
is there and exchange nothing.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megarl.config import ParallelConfig
from megarl.models.family import FAMILIES, ModelSpec, spec_from_hf_config
from megarl.parallel.layout import EXPERT_TENSOR_PARALLEL_SIZE, ParallelLayout
from tests.multi_rank.role_cases import DictSource
from tests.tiny_hf import KINDS, MIXTURES, tiny_config

NUM_LAYERS = 5
SP = {"sequence": True}
DENSE = [  # ranks, parallel
    (1, {}),
    (2, {"tensor": 2}),
    (4, {"tensor": 4} | SP),  # more ranks than key-value heads
    (5, {"pipeline": 5}),
    (8, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2} | SP),
    (8, {"tensor": 2, "context": 2, "pipeline": 2}),
    (12, {"tensor": 4, "pipeline": 3}),
]
SPARSE = [
    (1, {}),
    (4, {"expert": 4}),
    (4, {"tensor": 4} | SP),
    (8, {"tensor": 2, "pipeline": 2, "expert": 4} | SP),
    (8, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
    (8, {"context": 2, "pipeline": 2, "expert": 4}),
]


def test_every_family_has_a_tiny_model():
    assert {tiny_config(kind).model_type for kind in KINDS | MIXTURES} == set(FAMILIES)


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "fp32") for kind in KINDS | MIXTURES), ("gemma3", "bf16"), ("mixtral", "bf16")])
def test_all_that_is_imported_is_owned_once_and_exported_unchanged(kind, precision):
    spec, role = five_layers(kind), "critic" if kind.endswith("critic") else "actor"
    generator, dtype = torch.Generator().manual_seed(0), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in spec.table(role).hf_shapes.items()}
    for world_size, settings in SPARSE if kind in MIXTURES else DENSE:
        exported = {name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}
        for piece in imported_pieces(spec, role, precision, world_size, ParallelConfig(**settings), DictSource(weights)):
            if piece.is_owner:
                part = exported[piece.hf_name][tuple(slice(offset, offset + size) for offset, size in piece.box)]
                assert part.isnan().all(), f"{piece.hf_name} {piece.box} is owned twice under {settings}"
                part.copy_(piece.view)
        wrong = [name for name, tensor in exported.items() if not torch.equal(tensor, weights[name])]
        assert not wrong, f"{wrong} under {settings} of {world_size} ranks"


def five_layers(kind: str) -> ModelSpec:
    values = tiny_config(kind).to_dict() | {"num_hidden_layers": NUM_LAYERS}
    if values.get("layer_types"):
        values["layer_types"] = (values["layer_types"] * NUM_LAYERS)[:NUM_LAYERS]
    return spec_from_hf_config(values)


def imported_pieces(spec: ModelSpec, role: str, precision: str, world_size: int, parallel: ParallelConfig, source) -> list:
    """The pieces of every rank after an import."""
    from megarl.models.build import build_model
    from megarl.models.pieces import load_pieces, source_pieces

    found = []
    for rank in range(world_size):
        layout = ParallelLayout(parallel.tensor, parallel.pipeline, world_size, rank, context=parallel.context, expert=parallel.expert)
        with simulated(layout, parallel.virtual_pipeline):
            pieces = source_pieces(build_model(spec, role, parallel, precision, layout), spec.table(role))
            load_pieces(pieces, source)
        found += pieces
    return found


@contextlib.contextmanager
def simulated(layout: ParallelLayout, virtual_pipeline: int) -> Iterator[None]:
    """Megatron's parallel state as one rank of a layout sees it, without the others."""
    from megarl.parallel import groups

    dist.init_process_group("fake", store=FakeStore(), rank=layout.rank, world_size=layout.world_size)
    try:
        groups.parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=EXPERT_TENSOR_PARALLEL_SIZE,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        groups.shutdown()
