"""Megatron-LM checkpoints: read bit for bit, refused when they are of another model, and never run."""

import io
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

from megarl.checkpoint.hf_export import export
from megarl.checkpoint.megatron_dist import DistCheckpoint
from megarl.checkpoint.megatron_import import MegatronSource, import_megatron
from megarl.checkpoint.pickle_data import Made, Name, read_pickle
from megarl.checkpoint.sharded import whole
from megarl.config import ParallelConfig
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import CheckpointError, WeightMapError
from megarl.models.family import read_spec
from tests.megatron_files import NAMINGS, write_megatron
from tests.tiny_hf import edit_config, save_tiny
from tests.unit.text_files import sentencepiece_file

KINDS = ("llama3-tied", "qwen2", "qwen3-tied", "gemma3", "mixtral", "qwen3-moe")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tiny models with a tokenizer, each also as a Megatron-LM run."""
    from megarl.parallel import groups

    root, parallel = tmp_path_factory.mktemp("megatron"), ParallelConfig()
    tokens = sentencepiece_file(root / "sp.model", [f"{a}+{b}={a + b}" for a in range(40) for b in range(40)], vocab_size=40)
    layout = groups.initialize(parallel, seed=0)
    try:
        for kind in KINDS:
            load_tokenizer(tokens).save_for_export(save_tiny(kind, root))
            for naming in NAMINGS if kind in ("llama3-tied", "mixtral") else ("axes",):
                write_megatron(root / f"{kind}-{naming}", root / kind, parallel, layout, naming)
    finally:
        groups.shutdown()
    return root


@pytest.mark.parametrize(
    "kind, naming", [(kind, naming) for kind in KINDS for naming in NAMINGS if naming == "axes" or kind in ("llama3-tied", "mixtral")]
)
def test_every_tensor_is_read_bit_for_bit(root, kind, naming):
    source, expected = MegatronSource(root / f"{kind}-{naming}", read_spec(root / kind)), load_file(root / kind / "model.safetensors")
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.read(name, whole(tensor.shape)), tensor), name
        box = tuple((size // 3, size - size // 3) for size in tensor.shape)
        assert torch.equal(source.read(name, box), tensor[tuple(slice(low, low + size) for low, size in box)]), name


def test_import_and_export_of_a_megatron_run(root, tmp_path):
    import_megatron(root / "qwen2-axes", root / "qwen2", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    before, after = load_file(root / "qwen2" / "model.safetensors"), load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "qwen2-axes" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("llama3-tied", {"tie_word_embeddings": False}, "holds no output_layer.weight"),
        ("qwen2", {"tie_word_embeddings": True}, "no place for: output_layer.weight"),
        ("llama3-tied", {"num_hidden_layers": 4}, r"has shape \[3, .*\[4, "),
        ("llama3-tied", {"vocab_size": 200}, r"shape \[128, 64\].*\[200, 64\]"),
        ("qwen2", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "no place for: .*linear_qkv.bias"),
    ],
)
def test_another_model_is_refused(root, tmp_path, kind, changes, words):
    edit_config(shutil.copytree(root / kind, tmp_path / "hf"), **changes)
    with pytest.raises(WeightMapError, match=words):
        import_megatron(root / f"{kind}-axes", tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "holds no .metadata"),
        (lambda path: (path / "mp_rank_00").mkdir(), "ckpt-format torch_dist"),
        (lambda path: (path / "latest_checkpointed_iteration.txt").write_text("release"), "release holds no .metadata"),
    ],
)
def test_what_is_no_torch_dist_checkpoint_is_told(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        DistCheckpoint(tmp_path)


# ---------------------------------------------------------------- pickles that ask for more
class Evil:
    """What an attacker plants: a command that runs when the pickle is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root / "qwen2-axes" / "iter_0000007", tmp_path / "copy"), tmp_path / "it-ran"


def edit_metadata(directory, change):
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301  (written by this test)
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def refused(directory, root, words):
    with pytest.raises(CheckpointError, match=words):
        source = MegatronSource(directory, read_spec(root / "qwen2"))
        for name in source.names():
            source.read(name, whole(source.shape(name)))


def test_the_planted_pickle_would_run(tmp_path):
    """The other tests mean something only where loading the plant runs it."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "it-ran")))  # noqa: S301  (it must run)
    assert (tmp_path / "it-ran").exists()


def test_a_planted_pickle_in_the_namespace_is_not_opened(root, tmp_path, copy):
    directory, marker = copy
    torch.save(Evil(marker), directory / "common.pt")
    import_megatron(directory, root / "qwen2", tmp_path / "out")
    assert not marker.exists()


def test_a_planted_pickle_as_metadata_is_refused(root, copy):
    directory, marker = copy
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (directory / ".metadata").write_bytes(pickle.dumps(Evil(marker), protocol))
        refused(directory, root, "names posix.system.*nothing of it was run" if protocol > 0 else "refused|not a pickle|names")
    assert not marker.exists()


@pytest.mark.parametrize("where", ["planner_data", "storage_meta", "state_dict_metadata"])
def test_a_planted_pickle_inside_the_metadata_is_refused(root, copy, where):
    directory, marker = copy

    def plant(metadata):
        setattr(metadata, where, Evil(marker) if where != "state_dict_metadata" else metadata.state_dict_metadata | {"x": Evil(marker)})

    edit_metadata(directory, plant)
    refused(directory, root, "names posix.system")
    assert not marker.exists()


def plant_tensor(directory, content):
    """Point one tensor's chunk at `content`, put at the end of its file."""

    def change(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == "decoder.final_layernorm.weight")
        info = metadata.storage_data[index]
        path = directory / info.relative_path
        info.offset, info.length = path.stat().st_size, len(content)
        path.write_bytes(path.read_bytes() + content)

    edit_metadata(directory, change)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_planted_pickle_instead_of_a_tensor_is_refused(root, copy):
    directory, marker = copy
    plant_tensor(directory, saved(Evil(marker)))
    refused(directory, root, "final_layernorm.weight names posix.system")
    assert not marker.exists()


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.zeros(65), r"shape is \[65\]"),
        (torch.zeros(64, dtype=torch.float64), "expected a contiguous one of torch.float32"),
        (torch.zeros(64, 2)[:, 0], "contiguous"),
        ([torch.zeros(64)], "no plain tensor"),
    ],
    ids=["shape", "type", "strides", "list"],
)
def test_tensors_that_are_not_what_the_metadata_says(root, copy, value, words):
    plant_tensor(copy[0], saved(value))
    refused(copy[0], root, words)


def test_storage_that_is_too_small_or_compressed(root, copy):
    content = saved(torch.zeros(64))
    for compression, size in ((zipfile.ZIP_STORED, 100), (zipfile.ZIP_DEFLATED, 256)):
        changed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w", compression) as new:
            for member in old.namelist():
                data = old.read(member)
                new.writestr(member, data[:size] if "/data/" in member else data)
        plant_tensor(copy[0], changed.getvalue())
        refused(copy[0], root, "expected 256, plain")


@pytest.mark.parametrize("path", ["../copy/__0_0.distcp", "/etc/passwd", "a/b"])
def test_chunks_outside_the_checkpoint_are_refused(root, copy, path):
    def change(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = path

    edit_metadata(copy[0], change)
    refused(copy[0], root, "expected a file name in the checkpoint")


def test_missing_and_cut_files_are_told(root, copy):
    files = sorted(copy[0].glob("*.distcp"))
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(copy[0], root, "distcp")
    for path in files:
        path.unlink()
    refused(copy[0], root, "No such file")


def test_a_pickle_is_read_as_data():
    allowed = {("collections", "OrderedDict")}
    value = [1, -5, 2**80, 2.5, "text", b"bytes", None, True, (1, (2, 3)), {"a": {1, 2}}, frozenset([4])]
    value.append(value[9])
    for protocol in range(4, pickle.HIGHEST_PROTOCOL + 1):
        assert read_pickle(pickle.dumps(value, protocol), allowed, "here") == value
        made = read_pickle(pickle.dumps(OrderedDict(a=1), protocol), allowed, "here")
        assert type(made) is Made and made.name == Name("collections", "OrderedDict") and made.items == {"a": 1}


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"garbage", b"\x80\x04.", b"(.", b"\x80\x04K\x01K\x02s."])
def test_what_is_no_pickle_is_refused(data):
    with pytest.raises(CheckpointError, match="here"):
        read_pickle(data, (), "here")
