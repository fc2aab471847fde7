"""Files that carry a program, in the place of every file megarl reads: none runs, and each is refused in words."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import yaml

from megarl import cli
from megarl.checkpoint.hf_import import import_hf
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import DataError
from megarl.operations.events import read_events
from tests.unit.test_hf_export import save_hf
from tests.unit.text_files import sentencepiece_file
from tests.unit.tiny_run import PPO, SFT, write_run, write_shape


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def evil(tmp_path) -> tuple[bytes, Path]:
    marker = tmp_path / "it-ran"
    return pickle.dumps(Evil(marker)), marker


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Hugging Face directory and the checkpoint imported from it, below one directory."""
    root = tmp_path_factory.mktemp("model")
    save_hf(root / "hf", sentencepiece_file(root / "sp.model", [f"{a}+1={a + 1}" for a in range(200)], vocab_size=40))
    import_hf(root / "hf", root / "checkpoint")
    return root


def test_the_plant_would_run(evil):
    """The other tests mean something only where loading the plant runs it."""
    pickle.loads(evil[0])  # noqa: S301  (it must run)
    assert evil[1].exists()


def refused(arguments: list, marker: Path, capsys) -> str:
    code = cli.run([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert code not in (0, 1) and not marker.exists() and said.startswith("megarl: error: ") and "Traceback" not in said, said
    return said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_in_a_hugging_face_directory(model, evil, tmp_path, capsys, name):
    directory = shutil.copytree(model / "hf", tmp_path / "hf")
    assert (directory / name).exists()
    (directory / name).write_bytes(evil[0])
    said = refused(["import", directory, tmp_path / "out"], evil[1], capsys)
    assert str(directory) in said and not (tmp_path / "out").exists()


def test_weights_as_a_pickle_are_told_how_to_convert(model, evil, tmp_path, capsys):
    directory = shutil.copytree(model / "hf", tmp_path / "hf")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    (directory / "pytorch_model.bin").write_bytes(evil[0])
    assert "safetensors" in refused(["import", directory, tmp_path / "out"], evil[1], capsys)


def test_in_a_checkpoint(model, evil, tmp_path, capsys):
    files = [path.relative_to(model / "checkpoint") for path in (model / "checkpoint").rglob("*") if path.is_file()]
    read = [path for path in files if path.name != "latest" and not path.name.startswith(".attempt")]
    assert len(read) >= 4
    for path in read:
        directory = shutil.copytree(model / "checkpoint", tmp_path / "checkpoint")
        (directory / path).write_bytes(evil[0])
        refused(["export", directory, tmp_path / "out"], evil[1], capsys)
        shutil.rmtree(directory)


@pytest.mark.parametrize("key", ["prompts.jsonl", "actor/config.json"])
@pytest.mark.parametrize(("kind", "text"), [("ppo", PPO), ("sft", SFT)])
def test_in_the_files_of_a_run(evil, tmp_path, capsys, key, kind, text):
    config = write_run(tmp_path / "run", text)
    (tmp_path / "run" / key).write_bytes(evil[0])
    if key == "prompts.jsonl":
        refused(["data", "inspect", tmp_path / "run" / key], evil[1], capsys)
    else:
        assert Path(key).name in refused([kind, config, "--check"], evil[1], capsys)


@pytest.mark.parametrize("suffix", ["json", "parquet", "arrow"])
def test_in_a_dataset(evil, tmp_path, capsys, suffix):
    (tmp_path / f"data.{suffix}").write_bytes(evil[0])
    refused(["data", "inspect", tmp_path / f"data.{suffix}"], evil[1], capsys)


def test_in_a_tokenizer(evil, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(evil[0])
    (tmp_path / "tokenizer.model").write_bytes(evil[0])
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(DataError):
            load_tokenizer(path)
    assert not evil[1].exists()


def test_in_the_configuration(evil, tmp_path, capsys):
    config = write_run(tmp_path / "run")
    planted = f"seed: !!python/object/apply:os.system ['touch {evil[1]}']\n"
    yaml.unsafe_load(planted)
    assert evil[1].exists(), "it would run"
    evil[1].unlink()
    config.write_text(config.read_text() + planted)
    refused(["ppo", config, "--check"], evil[1], capsys)
    config.write_bytes(evil[0])
    refused(["ppo", config, "--check"], evil[1], capsys)


def test_in_what_a_run_has_written(evil, tmp_path):
    (tmp_path / "events.jsonl").write_bytes(evil[0] + b"\n")
    assert read_events(tmp_path) == [] and not evil[1].exists()
    assert cli.run(["goodput", str(tmp_path)]) == 78 and not evil[1].exists()


def test_code_beside_a_model_is_refused_or_left_alone(tmp_path, capsys):
    """A booby-trapped directory: every run that names it refuses it, and nothing in it was imported."""
    marker = tmp_path / "it-ran"
    for key, changes in {"configuration": {"auto_map": {"AutoModel": "evil.Model"}}, "type": {"model_type": "evil"}}.items():
        config = write_run(tmp_path / key)
        write_shape(tmp_path / key / "actor", **changes)
        for name in ("evil.py", "modeling_evil.py", "configuration_evil.py"):
            (tmp_path / key / "actor" / name).write_text(f"open({str(marker)!r}, 'w')\n")
        said = refused(["ppo", config, "--check"], marker, capsys)
        assert "actor" in said and ("auto_map" in said or "evil" in said)
