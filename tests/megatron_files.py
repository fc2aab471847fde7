"""Checkpoints as Megatron-LM writes them, by megatron-core's own dist_checkpointing, of tiny models."""

import argparse
from pathlib import Path

# how Megatron-Core may name the tensors of a layer: an axis for the layer, its number in the name, or one name for each projection
NAMINGS = {"axes": None, "names": {"non_homogeneous_layers": True}, "single": {"singleton_local_shards": True}}


def write_megatron(directory: Path, hf_dir: Path, parallel, layout, naming: str = "axes") -> Path:
    """Write the model of `hf_dir` as a Megatron-LM run under `directory`: every rank calls it. The usual namespace goes along."""
    from megatron.core import dist_checkpointing

    from megarl.checkpoint.sources import SafetensorsSource
    from megarl.models.build import build_model
    from megarl.models.family import read_spec
    from megarl.models.pieces import load_pieces, source_pieces

    spec = read_spec(hf_dir)
    chunks = build_model(spec, "actor", parallel, "fp32", layout)
    load_pieces(source_pieces(chunks, spec.table("actor")), SafetensorsSource(hf_dir))
    iteration = directory / "iter_0000007"
    iteration.mkdir(parents=True, exist_ok=True)
    state = {f"model{number}": chunk.sharded_state_dict(metadata=NAMINGS[naming]) for number, chunk in enumerate(chunks)}
    state |= {"args": argparse.Namespace(swiglu=True, save=Path("/somewhere")), "iteration": 7, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(iteration))
    (directory / "latest_checkpointed_iteration.txt").write_text("7")
    return directory
