"""Time and memory of `megarl export` and `megarl import` against the size of the model: `python -m benchmarks.checkpoint_export`.

Three models that differ in their number of layers alone. The conversions run in a process of their own, after one of a small model that
loads every library; each reports how far resident memory rose above what the small one left (VmHWM, the kernel's high-water mark, which
starts again for each). A conversion that holds one block of a tensor at a time has a slope of 0 bytes of memory for each byte of the model.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.table import main

MIB = 1 << 20
LAYERS = (4, 12, 36)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def write_model(directory: Path, num_layers: int, vocab_size: int) -> int:
    """A random bf16 Llama as a Hugging Face directory, written without holding it; returns the bytes of its weights."""
    import torch

    from megarl.checkpoint.hf_files import write_index
    from megarl.checkpoint.sharded import TensorEntry, write_tensors
    from megarl.models.family import read_spec

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": num_layers, "vocab_size": vocab_size}))
    shapes = read_spec(directory).table("actor").hf_shapes
    entries = [TensorEntry(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    write_tensors(directory / "model-00001-of-00001.safetensors", entries, lambda entry: torch.randn(entry.shape).bfloat16())
    write_index(directory, {"model-00001-of-00001.safetensors": entries})
    return sum(entry.num_bytes for entry in entries)


def convert(what: str, source: str, out: str) -> dict[str, float]:
    """One conversion in this process: its seconds, the most resident bytes during it, and those after it."""
    from megarl.checkpoint.hf_export import export
    from megarl.checkpoint.hf_import import import_hf

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from here
    start = time.perf_counter()
    if what == "export":
        export(Path(source), Path(out), max_shard_bytes=64 * MIB, proof="elements")
    else:
        import_hf(Path(source), Path(out))
    return {"seconds": time.perf_counter() - start, "peak_bytes": resident("VmHWM"), "bytes_after": resident("VmRSS")}


def resident(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def in_process(conversions: list[tuple[str, str, str]]) -> list[dict[str, float]]:
    """`convert` for each of them, in one new process."""
    command = [sys.executable, "-m", "benchmarks.checkpoint_export", "--convert", json.dumps(conversions)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def slope(sizes: list[int], values: list[float]) -> float:
    """Of the least-squares line through (size, value)."""
    x, y = sum(sizes) / len(sizes), sum(values) / len(values)
    return sum((a - x) * (b - y) for a, b in zip(sizes, values)) / sum((a - x) ** 2 for a in sizes)


def measure(quick: bool) -> Mapping[str, Any]:
    """One row a model and conversion, and the slopes over its size."""
    from tests.unit.text_files import sentencepiece_file

    layers, sizes, conversions = tuple(count // 4 for count in LAYERS) if quick else LAYERS, {}, []
    with tempfile.TemporaryDirectory(prefix="megarl-export-") as place:
        root = Path(place)
        sums = [f"{a}+{b}={a + b}" for a in range(40) for b in range(40)]
        tokens = sentencepiece_file(root / "sp.model", sums, vocab_size=40)
        for count in (1, *layers):
            model = root / f"model-{len(sizes)}"
            sizes[model.name] = (count, write_model(model, count, 4096 if quick else 16384))
            shutil.copyfile(tokens, model / "tokenizer.model")
            checkpoint = root / f"checkpoint-{model.name}"
            conversions += [("import", str(model), str(checkpoint)), ("export", str(checkpoint), str(root / f"out-{model.name}"))]
        (_, small), results = (found := in_process(conversions))[:2], found[2:]
    rows: list[dict[str, Any]] = []
    for (what, _, _), result, (count, num_bytes) in zip(
        conversions[2:], results, [sizes[name] for name in list(sizes)[1:] for _ in range(2)]
    ):
        rows.append(
            {
                "conversion": what,
                "layers": count,
                "model MiB": round(num_bytes / MIB, 1),
                "seconds": result["seconds"],
                "MB/s": num_bytes / 1e6 / result["seconds"],
                "peak MiB": round((result["peak_bytes"] - small["bytes_after"]) / MIB, 1),
            }
        )
    slopes = {}
    for what in ("import", "export"):
        mine = [row for row in rows if row["conversion"] == what]
        axis = [row["model MiB"] for row in mine]
        slopes[f"{what}: bytes of memory for each byte of the model"] = slope(axis, [row["peak MiB"] for row in mine])
        slopes[f"{what}: seconds for each GB of the model"] = slope(axis, [row["seconds"] for row in mine]) * 1e9 / MIB
    return {"Conversion against the size of the model": rows, **slopes}


if __name__ == "__main__":
    if "--convert" in sys.argv:
        print(json.dumps([convert(*conversion) for conversion in json.loads(sys.argv[-1])]))
    else:
        main("checkpoint_export", __doc__.splitlines()[0], measure)
