"""How a command on several ranks ends: one line for a user's mistake, no rank left waiting for one that broke."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.unit.text_files import character_tokenizer_directory, write_lines
from tests.unit.tiny_run import SFT, write_run

ROOT = Path(__file__).parents[2]


def torchrun(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """`MODULE ARGUMENTS` on two ranks, started as launch/torchrun.sh starts them."""
    command = [sys.executable, "-m", "megarl.launcher", "--nproc-per-node", "2", "--max-restarts", "0", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--local-addr", "localhost", "--module", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120)


def lesson(root: Path) -> Path:
    path = write_run(root, SFT)
    (root / "tokenizer" / "tokenizer.json").unlink()
    character_tokenizer_directory(root / "tokenizer")
    write_lines(root / "prompts.jsonl", [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(40)])
    return path


def test_a_mistake_in_the_data_is_said_once(tmp_path):
    path = lesson(tmp_path)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "no response"}\n')
    ended = torchrun("megarl", "sft", str(path))
    assert ended.returncode == 65, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "megarl: error" in line]
    assert len(lines) == 1 and "prompts.jsonl" in lines[0] and "41" in lines[0], ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_rank_that_breaks_ends_the_others(tmp_path):
    begun = time.monotonic()
    ended = torchrun("tests.multi_rank.crashing_command", "sft", str(lesson(tmp_path)))
    assert ended.returncode == 1, ended.stderr
    assert "[rank 1] ZeroDivisionError: rank 1 breaks" in ended.stderr
    assert time.monotonic() - begun < 100


def test_a_lesson_ends_well(tmp_path):
    path, long = lesson(tmp_path), {"prompt": "1+" * 60, "response": "60"}
    write_lines(tmp_path / "held_out.jsonl", [{"prompt": "1+1=", "response": "2"}, long])
    data = [f"data.eval_path={tmp_path}/held_out.jsonl", "data.overlong=skip"]
    ended = torchrun("megarl", "sft", str(path), "precision=fp32", "train.total_steps=1", *data)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("held_out.jsonl: 1 rows longer than data.max_tokens=64 skipped") == 1, ended.stderr
    folder = tmp_path / "runs" / "sft"
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert {"config.yaml", "versions.json", "checkpoints"} <= {path.name for path in folder.iterdir()}
