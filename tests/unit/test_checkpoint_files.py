"""Files of a checkpoint: tensors survive exactly, damage is seen, covers are exact, progress is a value."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megarl.bridge.plan import num_elements
from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.manifest import FORMAT, Manifest, StoredFile, StoredLayout, StoredModel, read_manifest, step_directories, verify
from megarl.checkpoint.publish import point_to, publish, versions
from megarl.checkpoint.sharded import TensorEntry, cover_faults, measure, write_tensors, write_text
from megarl.checkpoint.train_state import TrainState
from megarl.errors import CheckpointError


def entries_of(tensors):
    return [TensorEntry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]


def test_written_file_is_what_safetensors_reads(tmp_path):
    tensors = {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 7).bfloat16(),
        "single": torch.randn(2, 3, 4).transpose(0, 2),
        "empty": torch.empty(0, dtype=torch.float64),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "mask": torch.tensor([True, False]),
    }
    asked = []
    written = write_tensors(tmp_path / "a.safetensors", entries_of(tensors), lambda e: asked.append(e.key) or tensors[e.key])
    assert sorted(asked) == sorted(tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert measure(tmp_path / "a.safetensors") == written


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        write_tensors(tmp_path / "a.safetensors", [TensorEntry("w", torch.float32, (2, 3))], lambda _: torch.zeros(3, 2))


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), row_cuts=st.sets(st.integers(1, 8)), column_cuts=st.sets(st.integers(1, 8)))
def test_any_grid_of_pieces_covers_exactly_once(rows, columns, row_cuts, column_cuts):
    def spans(size, cuts):
        edges = [0, *sorted(cut for cut in cuts if cut < size), size]
        return [(low, high - low) for low, high in zip(edges, edges[1:], strict=False)]

    boxes = [(row, column) for row in spans(rows, row_cuts) for column in spans(columns, column_cuts)]
    shapes = {"w": (rows, columns)}
    assert cover_faults(shapes, [("w", box) for box in boxes]) == []
    assert cover_faults(shapes, [("w", box) for box in boxes[1:]])
    assert cover_faults(shapes, [("w", box) for box in [*boxes, boxes[0]]])
    if len(boxes) > 1 and num_elements(boxes[0]) == num_elements(boxes[1]):
        assert cover_faults(shapes, [("w", box) for box in [boxes[1], *boxes[1:]]])


def test_cover_names_unknown_tensors_and_boxes_outside():
    assert "not in the table" in cover_faults({"w": (2,)}, [("v", ((0, 2),)), ("w", ((0, 2),))])[0]
    assert "outside the shape" in cover_faults({"w": (2,)}, [("w", ((1, 2),))])[0]
    assert "0 of 2" in cover_faults({"w": (2,)}, [])[0]


def test_train_state_survives_json_exactly():
    state = TrainState(step=3, policy_version=2, prompts_consumed=192, kl_coef=0.1 + 0.2)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_train_state_advances():
    state = TrainState(kl_coef=0.05).advance(64, is_policy_updated=False).advance(64, kl_coef=0.06)
    assert state == TrainState(step=2, policy_version=1, prompts_consumed=128, kl_coef=0.06)


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": 1.5}, {"kl_coef": float("nan")}, {"step": "1"}, {"more": 1}, {"policy_version": True}]
)
def test_train_state_refuses_what_it_did_not_write(change):
    with pytest.raises(CheckpointError):
        TrainState.from_json({**TrainState().to_json(), **change})


def make_checkpoint(directory, name="step-00000001"):
    staging = directory / f".staging-{name}"
    staging.mkdir(parents=True)
    written = write_text(staging / "a.txt", "what was written")
    file = StoredFile(kind="config", num_bytes=written.num_bytes, sha256=written.sha256)
    manifest = Manifest(
        format=FORMAT,
        course="sft",
        state=TrainState().to_json(),
        layout=StoredLayout(),
        models={"actor": StoredModel(shapes={"w": (2, 3)})},
        files={"a.txt": file},
        versions=versions(),
    )
    publish(staging, directory / name, manifest)
    point_to(directory / name)
    return directory / name, manifest


def test_manifest_survives_and_the_pointer_follows(tmp_path):
    directory = tmp_path / "checkpoints"
    first, manifest = make_checkpoint(directory)
    second, _ = make_checkpoint(directory, "step-00000012")
    assert read_manifest(first) == manifest
    assert step_directories(directory) == [first, second]
    assert (directory / "latest").read_text() == "step-00000012\n"
    assert manifests.find_checkpoint(tmp_path) == manifests.find_checkpoint(directory) == manifests.find_checkpoint(second) == second
    assert not list(directory.glob(".*")), "nothing is left of the staging directories"
    verify(first, "a.txt", manifest.files["a.txt"])


def test_unfinished_directories_are_not_checkpoints(tmp_path):
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".staging-step-00000010").mkdir()
    assert manifests.find_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_seen_before_use(tmp_path, damage):
    directory, manifest = make_checkpoint(tmp_path)
    path = directory / "a.txt"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    {"flip": lambda: path.write_bytes(data), "truncate": lambda: path.write_bytes(data[:-1]), "remove": path.unlink}[damage]()
    with pytest.raises(CheckpointError, match="a.txt"):
        verify(directory, "a.txt", manifest.files["a.txt"])


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..\\b", ""])
def test_manifest_may_not_name_files_outside(tmp_path, name):
    directory, _ = make_checkpoint(tmp_path)
    content = json.loads((directory / "manifest.json").read_text())
    content["files"] = {name: content["files"]["a.txt"]}
    (directory / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside"):
        read_manifest(directory)


@pytest.mark.parametrize("change", [{"format": 2}, {"surprise": 1}, {"models": {"judge": {"shapes": {}}}}, {"files": 3}])
def test_malformed_manifests_are_refused(tmp_path, change):
    directory, _ = make_checkpoint(tmp_path)
    content = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match="manifest.json"):
        read_manifest(directory)
