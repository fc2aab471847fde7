"""R8: whatever happens to a checkpoint on disk is seen before a weight is used, named with both hashes, and an older one serves."""

import contextlib
import io
import os
import random
import shutil
from pathlib import Path

import pytest
from blake3 import blake3

from megarl.errors import MegarlError
from tests.course.lesson_files import write_files
from tests.faults.workshop import Bench, in_workshop, make_bench

UNTOUCHED = 77.0


class Shelf:
    """Two checkpoints of a run, and how to put them back after each damage."""

    def __init__(self, bench: Bench, root: Path):
        self.bench, self.pristine = bench, root / "pristine"
        bench.save(bench.save(bench.restore()))
        shutil.copytree(bench.directory, self.pristine)
        self.newest = bench.directory / "step-00000002"

    def restore(self) -> tuple[int | None, str, list[float]]:
        """(step continued from, or None where refused; everything said; the numbers in the weights afterwards)."""
        self.bench.fill(UNTOUCHED)
        step, said = None, io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                step = self.bench.restore().step
            except MegarlError as error:
                print(error, file=said)
        return step, said.getvalue(), self.bench.filled_with()

    def put_back(self) -> None:
        shutil.rmtree(self.bench.directory)
        shutil.copytree(self.pristine, self.bench.directory)

    def files(self) -> list[Path]:
        return sorted(path for path in self.newest.rglob("*") if path.is_file())


def flip_bits(root: Path, count: int, seed: int) -> dict:
    """`count` flips of one bit in the newest checkpoint, each followed by a restore; a strict run is asked as well."""
    shelf, rng = Shelf(make_bench(root, background="off"), root), random.Random(seed)
    strict = make_bench(root, background="off", strict=True)
    sizes = {path: path.stat().st_size for path in shelf.files()}
    wrong, hit = [], {}
    for number in range(count):
        # every other flip in a file drawn among all, the rest in a byte drawn among all
        path = rng.choice(list(sizes)) if number % 2 else rng.choices(list(sizes), list(sizes.values()))[0]
        position, bit = rng.randrange(sizes[path]), 1 << rng.randrange(8)
        before = path.read_bytes()
        after = bytearray(before)
        after[position] ^= bit
        path.write_bytes(after)
        hit[path.suffix] = hit.get(path.suffix, 0) + 1
        named = "manifest.json" if path.name.startswith("manifest.json") else path.name
        if number % 10 == 0:
            shelf.bench, keep = strict, shelf.bench
            step, said, numbers = shelf.restore()
            shelf.bench = keep
            if step is not None or numbers != [UNTOUCHED] or named not in said or "checkpoint.strict" not in said:
                wrong.append([str(path), position, bit, "strict", step, said, numbers])
        step, said, numbers = shelf.restore()
        is_told = named in said and "continuing from step-00000001" in said
        if not path.name.startswith("manifest.json"):
            is_told &= all(blake3(data).hexdigest() in said for data in (before, after))
        if step != 1 or numbers != [1.0] or not is_told:
            wrong.append([str(path), position, bit, step, said, numbers])
        shelf.put_back()
    return {"flips": count, "wrong": wrong, "hit": hit}


def damage(root: Path) -> dict:
    """Other damage, by name: (step, said, numbers)."""
    shelf = Shelf(make_bench(root, background="off"), root)
    newest, results = shelf.newest, {}
    weights, optimizer = (sorted((newest / "actor").glob(f"{kind}-*.safetensors"))[0] for kind in ("weights", "optimizer"))

    def swap(a: Path, b: Path) -> None:
        contents = a.read_bytes(), b.read_bytes()
        b.write_bytes(contents[0])
        a.write_bytes(contents[1])

    def stale(files: tuple[str, ...]) -> None:
        for name in files:
            shutil.copyfile(shelf.bench.directory / "step-00000001" / name, newest / name)

    cases = {f"cut {path.relative_to(newest)}": (lambda path=path: os.truncate(path, path.stat().st_size // 2)) for path in shelf.files()}
    cases |= {f"no {path.relative_to(newest)}": path.unlink for path in shelf.files()}
    cases |= {f"empty {path.relative_to(newest)}": (lambda path=path: os.truncate(path, 0)) for path in shelf.files()}
    cases["swapped shards"] = lambda: swap(weights, optimizer)
    cases["shard of another step"] = lambda: stale((f"actor/{weights.name}",))
    cases["stale manifest"] = lambda: stale(("manifest.json",))
    cases["stale manifest with its hash"] = lambda: stale(("manifest.json", "manifest.json.sha256"))
    cases["directory renamed"] = lambda: newest.rename(newest.with_name("step-00000003"))
    for name, act in cases.items():
        act()
        results[name] = shelf.restore()
        shelf.put_back()
    for name, text in {"empty": "", "stale": "step-00000001\n", "elsewhere": "../../etc\n"}.items():
        (shelf.bench.directory / "latest").write_text(text)
        results[f"pointer {name}"] = shelf.restore()
        shelf.put_back()
    for path in shelf.bench.directory.glob("step-*"):
        data = bytearray((path / "random-00000.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "random-00000.safetensors").write_bytes(data)
    results["all"] = shelf.restore()
    return results


def check_flips(result: dict) -> None:
    print(f"R8: {result['flips']} flips, {len(result['wrong'])} not as they should be; by kind of file {result['hit']}")
    assert result["wrong"] == [], result["wrong"][:3]
    assert len(result["hit"]) >= 3


def test_some_flipped_bits(tmp_path):
    check_flips(in_workshop(flip_bits, write_files(tmp_path), 40, 0))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_thousand_flipped_bits(tmp_path):
    check_flips(in_workshop(flip_bits, write_files(tmp_path), 1000, 1))


def test_cut_missing_swapped_and_stale_files(tmp_path):
    results = in_workshop(damage, write_files(tmp_path))
    print(f"R8: {len(results)} kinds of damage")
    step, said, numbers = results.pop("all")
    assert step is None and numbers == [UNTOUCHED] and "random-00000.safetensors" in said
    for name in [name for name in results if name.startswith("pointer")]:
        assert results.pop(name)[::2] == (2, [2.0]), "the pointer is for people: manifests decide"
    for name, (step, said, numbers) in results.items():
        assert step == 1 and numbers == [1.0], (name, step, said)
        file = name.split()[-1].split("/")[-1] if name.startswith(("cut", "no ", "empty")) else "step-0000000"
        assert ("manifest.json" if file.startswith("manifest.json") else file) in said, (name, said)
