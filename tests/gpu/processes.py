"""Run a function on N ranks of this host as a run does: megarl's launcher, torchrun's variables, one device a rank.

    results = run_on_devices(check, 2, tmp_path, steps=3)      # results[rank], what check(steps=3) returned there

`check` stands at module level; arguments and results are JSON.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAUNCH = ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "localhost", "--max-restarts", "0"]


def run_on_devices(function: Callable, num_ranks: int, folder: Path, timeout_s: float = 540, **arguments: Any) -> list:
    """What `function(**arguments)` returned on each rank. Raises `AssertionError` with the ranks' output when one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    name, log = f"{function.__module__}:{function.__name__}", folder / "ranks.log"
    command = [sys.executable, "-m", "megarl.launcher", "--nproc-per-node", str(num_ranks), *LAUNCH, "--module", __name__]
    command += [name, json.dumps(arguments), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        code = f"none after {timeout_s} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, f"{name} on {num_ranks} ranks: exit code {code}\n{log.read_text(errors='replace')[-6000:]}"
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]


def main(name: str, arguments: str, folder: str) -> None:
    """One rank. Leaves without destructors: vLLM's would end the process groups of others."""
    from megarl.cli import leave

    try:
        module, _, function = name.partition(":")
        result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
        (Path(folder) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
