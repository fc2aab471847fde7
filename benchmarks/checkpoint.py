"""Saving and loading a run: GB/s against raw files of the same bytes and against torch's distributed checkpoints, and what a step pays.

`python -m benchmarks.checkpoint [--quick] [--directory DIR] [--json PATH]`

One rank saves a Llama with its optimizer (float32 weights and two moments). Raw: the same bytes through one `write` after the other into
one file, flushed to disk, and read back. Every way to save writes beside what it saved before and then removes that, as a run does.
Everything alternates in one run, after turns that have touched as much page cache as will be used: on a virtual machine a page's first
touch can cost more than its write. Files lie in the page cache when they are read. Peak extra
memory is the growth of the process' resident memory over what it was before (`VmHWM` of /proc, reset before each run).
"""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import sentencepiece
import torch
import torch.distributed.checkpoint as dcp

from benchmarks.table import main
from megarl.checkpoint.files import plan_files
from megarl.checkpoint.manifest import read_manifest
from megarl.checkpoint.restore import load, verify_share
from megarl.checkpoint.store import Checkpoints
from megarl.checkpoint.train_state import TrainState
from megarl.config import SftRun
from megarl.course.lesson import Student
from megarl.data.tokenizers import Tokenizer, load_tokenizer
from megarl.models.family import spec_from_hf_config
from megarl.models.random_weights import RandomSource
from megarl.parallel import groups
from megarl.ppo.roles import build_learner

BLOCK_BYTES = 16 << 20
TARGET_SPEED, TARGET_STALL = 0.7, 10
GB, MIB = 1e9, 1 << 20
WARM_UP = 3  # turns


def model(quick: bool) -> dict:
    hidden, layers = (512, 4) if quick else (1024, 8)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 8000,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


class Contest:
    """The same state, saved and loaded in several ways."""

    def __init__(self, directory: Path, quick: bool):
        self.directory = directory
        self.runs = {background: make_run(directory, background) for background in ("off", "wait")}
        run = self.runs["off"]
        layout = groups.initialize(run.parallel, run.seed)
        spec = spec_from_hf_config(model(quick))
        source = RandomSource(spec.table("actor"), 0, spec.standard_deviation)
        learner, pieces = build_learner(spec, "actor", run.model, run, layout, source, 10)
        self.students = {"actor": Student(spec, learner, pieces)}
        generator = torch.Generator().manual_seed(0)
        for held in learner.optimizer_pieces(pieces).values():
            for piece in held:
                piece.view.normal_(generator=generator)
        self.tensors = {key: tensor for file in plan_files(0, self.students) for key, tensor in file.tensors.items()}
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        tokenizer = make_tokenizer(directory)
        self.stores = {name: Checkpoints("sft", run, layout, tokenizer, 10**6) for name, run in self.runs.items()}
        for store in self.stores.values():
            store.restore_or_start(self.students)
        self.step, self.stalls = 0, []

    def save(self, background: str) -> None:
        """Until it is published."""
        self.step += 1
        store = self.stores[background]
        store.save(TrainState(step=self.step), self.students)
        if background == "wait":
            self.stalls.append(store.stall_s)
        store.finish()

    def load(self) -> None:
        newest = max(self.stores["off"].directory.glob("step-*"))
        manifest = read_manifest(newest)
        verify_share(newest, manifest, 0, 1)
        load(newest, manifest, self.students)

    def raw_write(self) -> None:
        new = self.directory / "raw-new"
        with open(new, "wb", buffering=0) as file:
            for tensor in self.tensors.values():
                data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
                for start in range(0, len(data), BLOCK_BYTES):
                    file.write(data[start : start + BLOCK_BYTES])
            os.fsync(file.fileno())
        new.replace(self.directory / "raw")

    def raw_read(self) -> None:
        buffer = bytearray(BLOCK_BYTES)
        with open(self.directory / "raw", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def dcp_save(self) -> None:
        old, new = self.directory / "dcp", self.directory / "dcp-new"
        dcp.save(dict(self.tensors), storage_writer=dcp.FileSystemWriter(new, sync_files=True))
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)

    def dcp_load(self) -> None:
        dcp.load(dict(self.tensors), storage_reader=dcp.FileSystemReader(self.directory / "dcp"))


def make_run(directory: Path, background: str) -> SftRun:
    return SftRun.model_validate(
        {
            "output_dir": directory / background,
            "tokenizer": directory / "sp.model",
            "precision": "fp32",
            "model": {"path": directory},
            "data": {"path": directory},
            "train": {"total_steps": 10**6},
            "checkpoint": {"background": background, "keep_last": 1},
        }
    )


def make_tokenizer(directory: Path) -> Tokenizer:
    lines = [f"{a} and {b} make {a + b}" for a in range(30) for b in range(30)]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, vocab_size=40, model_type="char", pad_id=3, minloglevel=2
    )
    (directory / "sp.model").write_bytes(trained.getvalue())
    return load_tokenizer(directory / "sp.model")


def peak_growth(work: Callable[[], Any]) -> float:
    """MiB by which resident memory rose at most during `work`."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / MIB


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure(quick: bool, directory: Path | None) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory(prefix="megarl-benchmark-", dir=directory) as place:
        contest = Contest(Path(place), quick)
        saving = {
            "raw file": contest.raw_write,
            "megarl": lambda: contest.save("off"),
            "megarl, background": lambda: contest.save("wait"),
            "torch DCP": contest.dcp_save,
        }
        loading = {"raw file": contest.raw_read, "megarl, every byte verified": contest.load, "torch DCP": contest.dcp_load}
        repeats = 2 if quick else 9
        saved, loaded = timed(saving, repeats), timed(loading, repeats)
        stall = median(contest.stalls[WARM_UP:])
        peaks = {name: peak_growth(work) for name, work in (saving | {f"load: {name}": work for name, work in loading.items()}).items()}
        gigabytes = contest.num_bytes / GB
    groups.shutdown()
    raw = saved["raw file"]
    return {
        f"Save {gigabytes:.2f} GB": rows(saved, gigabytes, raw, peaks, ""),
        f"Load {gigabytes:.2f} GB": rows(loaded, gigabytes, raw, peaks, "load: "),
        "gigabytes": gigabytes,
        f"save over raw writes (target {TARGET_SPEED})": raw / saved["megarl"],
        f"load over raw writes (target {TARGET_SPEED})": raw / loaded["megarl, every byte verified"],
        "save over torch DCP": saved["torch DCP"] / saved["megarl"],
        "load over torch DCP": loaded["torch DCP"] / loaded["megarl, every byte verified"],
        "a step waits for a save, s": saved["megarl"],
        "a step waits for one in the background, s": stall,
        f"times less (target {TARGET_STALL})": saved["megarl"] / stall,
    }


def timed(contenders: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds; contenders take turns, in another order each time, after turns to warm up. The disk is quiet at each start."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(WARM_UP + repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            os.sync()
            start = time.perf_counter()
            contenders[name]()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def rows(seconds: Mapping[str, float], gigabytes: float, raw: float, peaks: Mapping[str, float], prefix: str) -> list[dict[str, Any]]:
    """`raw` are the seconds that it takes to write the same bytes."""
    return [
        {"": name, "s": taken, "GB/s": gigabytes / taken, "of raw writes": raw / taken, "peak extra MiB": round(peaks[prefix + name])}
        for name, taken in seconds.items()
    ]


if __name__ == "__main__":
    where = {"type": Path, "help": "on the disk to measure (default: where temporary files are)"}
    main("checkpoint", "Speed of checkpoints", measure, {"directory": where})
