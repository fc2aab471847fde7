"""Conversion by or of several ranks: Megatron-LM checkpoints of any layout, and an export whose files the ranks share."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarl.checkpoint.hf_export import export
from megarl.checkpoint.hf_import import import_hf
from megarl.checkpoint.megatron_import import MegatronSource
from megarl.checkpoint.sharded import whole
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import CheckpointError
from megarl.models.family import read_spec
from tests.megatron_files import write_megatron
from tests.ranks import run_ranks
from tests.tiny_hf import save_tiny
from tests.unit.text_files import sentencepiece_file

LAYOUTS = {
    "llama3-tied": {"tensor": 2, "sequence": True},
    "qwen2": {"pipeline": 2},
    "gemma3": {"tensor": 2},
    "mixtral": {"tensor": 2, "sequence": True, "expert": 2},
}


def write_and_export(rank: int, world_size: int, root: Path) -> str:
    from megarl.config import ParallelConfig
    from megarl.parallel import groups

    for kind, axes in LAYOUTS.items():
        parallel = ParallelConfig(**axes)
        write_megatron(root / f"{kind}-megatron", root / kind, parallel, groups.initialize(parallel, seed=0))
    layout = groups.initialize(ParallelConfig(), seed=0)
    export(root / "checkpoint", root / "together", max_shard_bytes=40_000, layout=layout)
    try:
        export(root / "damaged", root / "never", max_shard_bytes=40_000, layout=layout)
    except CheckpointError as error:
        return str(error)
    return "exported"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("conversion")
    tokens = sentencepiece_file(root / "sp.model", [f"{a}+{b}={a + b}" for a in range(40) for b in range(40)], vocab_size=40)
    for kind in LAYOUTS:
        load_tokenizer(tokens).save_for_export(save_tiny(kind, root))
    import_hf(root / "qwen2", root / "checkpoint")
    damaged = next((shutil.copytree(root / "checkpoint", root / "damaged") / "actor").glob("weights-*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    export(root / "checkpoint", root / "alone", max_shard_bytes=40_000)
    return root, run_ranks(write_and_export, 2, root)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_megatron_checkpoints_of_any_layout(ranks, kind):
    root, _ = ranks
    source, expected = MegatronSource(root / f"{kind}-megatron", read_spec(root / kind)), load_file(root / kind / "model.safetensors")
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.read(name, whole(tensor.shape)), tensor), name


def test_ranks_that_share_an_export_write_the_same_directory(ranks):
    root, _ = ranks
    alone, together = ({path.name: path.read_bytes() for path in (root / name).iterdir()} for name in ("alone", "together"))
    assert sum(name.endswith(".safetensors") for name in alone) > 3 and alone.keys() == together.keys()
    assert all(together[name] == alone[name] for name in alone if name != "README.md")
    assert "logits on 3 fixed prompts" in together["README.md"].decode()


def test_damage_ends_the_export_on_every_rank(ranks):
    root, messages = ranks
    assert all("BLAKE3" in message for message in messages) and not (root / "never").exists()
    assert not list(root.glob(".staging*"))
