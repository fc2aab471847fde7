"""`megarl checkpoint list | verify | show | diff | prune`: what they find, what they print, what they leave alone."""

import argparse
import json
import shutil

import pytest

from megarl import cli
from megarl.checkpoint.hf_import import import_hf
from megarl.checkpoint.manifest import read_manifest
from megarl.checkpoint.publish import point_to, publish
from megarl.data.tokenizers import load_tokenizer
from megarl.file_commands import size_in_bytes
from tests.tiny_hf import save_tiny
from tests.unit.text_files import sentencepiece_file

STEPS = (2, 4, 5, 6, 8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two models that differ in one element of one tensor, as Hugging Face directories and imported."""
    root = tmp_path_factory.mktemp("sources")
    tokens = sentencepiece_file(root / "sp.model", [f"{a}+{b}={a + b}" for a in range(40) for b in range(40)], vocab_size=40)
    load_tokenizer(tokens).save_for_export(save_tiny("llama", root))
    shutil.copytree(root / "llama", root / "other")
    change_tensor(root / "other" / "model.safetensors")
    for name in ("llama", "other"):
        import_hf(root / name, root / f"{name}-checkpoint")
    return root


def change_tensor(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.norm.weight"][5] += 0.25
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def run(sources, tmp_path):
    """A run's output directory with checkpoints of five steps."""
    for step in STEPS:
        add_step(sources / "llama-checkpoint", tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def add_step(checkpoint, directory, step):
    staging = directory / f".staging-{step}"
    shutil.copytree(checkpoint, staging)
    manifest = read_manifest(checkpoint)
    changes = {"state": dict(manifest.state) | {"step": step}, "run": {"checkpoint": {"keep_last": 2}}, "course": "sft"}
    publish(staging, directory / f"step-{step:08d}", manifest.model_copy(update=changes))
    point_to(directory / f"step-{step:08d}")


def command(capsys, *arguments):
    """Exit code, standard output (read as JSON where `--json` asks for it) and standard error."""
    code = cli.run(["checkpoint", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if "--json" in arguments and out else out, err


def flip(path, position=-5):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def test_list_tells_whole_from_damaged_and_left_over(capsys, run):
    checkpoints = run / "checkpoints"
    (checkpoints / ".staging-step-00000009").mkdir()
    weights = checkpoints / "step-00000004" / "actor" / "weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (checkpoints / "step-00000005" / "manifest.json").unlink()
    code, out, _ = command(capsys, "list", run)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert "complete" in lines["step-00000002"] and "sft" in lines["step-00000002"] and "tp1 pp1 dp1" in lines["step-00000002"]
    assert "weights-00000.safetensors has" in lines["step-00000004"]
    assert (
        "not a complete checkpoint" in lines["step-00000005"]
        and "left over" in lines[".staging-step-00000009"]
        and "step-00000008 *" in lines["step-00000008"]
    )
    _, told, _ = command(capsys, "list", run, "--json")
    assert [entry["step"] for entry in told if not entry["state"]] == [2, 6, 8]
    assert [entry["name"] for entry in told if entry["is_latest"]] == ["step-00000008"]


def test_list_names_a_pointer_to_nothing(capsys, run):
    (run / "checkpoints" / "latest").write_text("step-00000099\n")
    assert "names 'step-00000099', which is not there" in command(capsys, "list", run)[1]


def test_verify_reads_every_byte(capsys, run):
    code, out, _ = command(capsys, "verify", run, "--all")
    assert code == 0 and out.count("every byte is what was written") == len(STEPS) and "GB/s" in out


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap", "extra", "manifest"])
def test_verify_names_file_expected_and_found(capsys, run, damage):
    newest = run / "checkpoints" / "step-00000008"
    weights, config = newest / "actor" / "weights-00000.safetensors", newest / "actor" / "config.json"
    recorded = read_manifest(newest).files["actor/weights-00000.safetensors"]
    {
        "flip": lambda: flip(weights),
        "truncate": lambda: weights.write_bytes(weights.read_bytes()[:-3]),
        "remove": weights.unlink,
        "swap": lambda: (weights.rename(newest / "w"), config.rename(weights), (newest / "w").rename(config)),
        "extra": lambda: (newest / "actor" / "weights-00001.safetensors").write_bytes(b"what is this"),
        "manifest": lambda: (newest / "manifest.json").write_text("{}"),
    }[damage]()
    code, told, err = command(capsys, "verify", run, "--json")
    assert code == 2 and "step-00000008: not what was written" in err
    found = {finding["file"]: finding for finding in told[0]["findings"]}
    if damage in ("flip", "truncate", "remove"):
        (finding,) = found.values()
        expected = {"flip": recorded.blake3, "truncate": f"{recorded.num_bytes} bytes", "remove": f"{recorded.num_bytes} bytes"}[damage]
        shown = {"truncate": f"{recorded.num_bytes - 3} bytes", "remove": "No such file or directory"}.get(damage, "")
        assert finding["file"] == "actor/weights-00000.safetensors" and expected in finding["expected"] and shown in finding["found"]
    expected_files = {
        "swap": {"actor/weights-00000.safetensors", "actor/config.json"},
        "extra": {"actor/weights-00001.safetensors"},
        "manifest": {"manifest.json"},
    }
    assert damage not in expected_files or set(found) == expected_files[damage]
    code, out, _ = command(capsys, "verify", run)
    assert code == 2 and all(name.split("/")[-1] in out for name in found)


def test_verify_compares_the_tensors_with_the_manifest(capsys, run):
    """The bytes are those of the manifest, but the manifest was made for other tensors."""
    checkpoint = run / "checkpoints" / "step-00000008"
    manifest = read_manifest(checkpoint)
    file = manifest.files["actor/weights-00000.safetensors"]
    tensors = (file.tensors[0].model_copy(update={"box": ((1, 100), (0, 64))}), *file.tensors[1:])
    changed = manifest.model_copy(
        update={"files": manifest.files | {"actor/weights-00000.safetensors": file.model_copy(update={"tensors": tensors})}}
    )
    shutil.copytree(checkpoint, run / "staging")
    publish(run / "staging", checkpoint, changed)
    code, told, _ = command(capsys, "verify", checkpoint, "--json")
    findings = [finding["file"] for finding in told[0]["findings"]]
    assert code == 2 and findings == [f"actor/weights-00000.safetensors: {tensors[0].key}", "actor"]


def test_show_says_what_a_checkpoint_holds(capsys, run):
    code, out, _ = command(capsys, "show", run)
    assert code == 0 and "step-00000008" in out and "tp1 pp1 dp1" in out and "state: step" in out and "models: actor" in out
    _, facts, _ = command(capsys, "show", run / "checkpoints" / "step-00000002", "--json")
    assert facts["state"]["step"] == 2 and facts["models"]["actor"]["types"] == ["F32"]
    assert facts["models"]["actor"]["parameters"] == 101 * 64 * 2 + 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 96 * 64 + 2 * 64) + 64


@pytest.mark.parametrize("a, b", [("llama-checkpoint", "other-checkpoint"), ("llama", "other-checkpoint"), ("other", "llama")])
def test_diff_names_the_tensor_and_the_largest_difference(capsys, sources, a, b):
    code, (found,), _ = command(capsys, "diff", sources / a, sources / b, "--json")
    assert code == 0 and found["largest"] == pytest.approx(0.25, rel=1e-5)
    assert (found["tensor"], found["num_different"], found["num_elements"]) == ("model.norm.weight", 1, 64)
    out = command(capsys, "diff", sources / a, sources / b)[1]
    assert "0.25" in out and "1 of 64" in out and "1 tensors differ" in out


def test_diff_of_equal_models_and_of_other_types(capsys, sources, tmp_path):
    assert command(capsys, "diff", sources / "llama", sources / "llama-checkpoint")[1] == "equal in every element\n"
    half = import_hf(sources / "llama", tmp_path / "half", dtype="bf16")
    told = command(capsys, "diff", sources / "llama", half, "--json")[1]
    assert len(told) == 21 and all(entry["what"] == "types float32 and bfloat16" and 0 < entry["largest"] < 0.01 for entry in told)
    out = command(capsys, "diff", sources / "llama", half, "--limit", "3")[1]
    assert "21 tensors differ, 18 not shown" in out


def test_diff_of_other_shapes(capsys, sources, tmp_path):
    told = command(capsys, "diff", sources / "llama", save_tiny("qwen3-tied", tmp_path), "--json")[1]
    what = {entry["tensor"]: entry["what"] for entry in told}
    assert "only in" in what["lm_head.weight"] and what["model.layers.0.self_attn.q_proj.weight"] == "shapes [64, 64] and [96, 64]"


@pytest.mark.parametrize(
    "rules, kept", [([], {6, 8}), (["--keep-last", 1], {8}), (["--keep-last", 1, "--keep-every-steps", 4], {4, 8})], ids=str
)
def test_prune_keeps_what_the_rules_keep(capsys, run, rules, kept):
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    code, out, _ = command(capsys, "prune", run, "--dry-run", *rules)
    assert code == 0 and f"{len(STEPS) - len(kept)} would be removed" in out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    code, told, _ = command(capsys, "prune", run, "--json", *rules)
    assert code == 0 and told["kept"] == [f"step-{step:08d}" for step in sorted(kept)]
    assert {int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")} == kept


def test_prune_leaves_alone_what_is_damaged(capsys, run):
    weights = run / "checkpoints" / "step-00000008" / "actor" / "weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, told, _ = command(capsys, "prune", run, "--keep-last", 1, "--json")
    assert code == 0 and told["kept"] == ["step-00000006"] and list(told["untouched"]) == ["step-00000008"]
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("action", ["list", "verify", "show", "prune"])
def test_nothing_there_is_one_line(capsys, tmp_path, action):
    code, _, err = command(capsys, action, tmp_path / "nowhere")
    assert code == 2 and "nowhere" in err and err.count("\n") == 1


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("1.5kB", 1500), ("77", 77)])
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "5 pounds", "-1GB", "0.1"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size"):
        size_in_bytes(text)


def test_export_and_import_take_sizes_types_and_proofs(capsys, sources, tmp_path):
    out = tmp_path / "out"
    assert (
        cli.run(["export", str(sources / "llama-checkpoint"), str(out), "--shard-size", "100kB", "--dtype", "bf16", "--proof", "elements"])
        == 0
    )
    assert len(list(out.glob("*.safetensors"))) > 1 and "exported" in capsys.readouterr().out
    assert cli.run(["import", str(out), str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    assert read_manifest(tmp_path / "back").files["actor/weights-00000.safetensors"].tensors[0].dtype == "F32"
    assert cli.run(["import", str(out), str(tmp_path / "x"), "--from-megatron"]) == 78 and "--hf-config" in capsys.readouterr().err
