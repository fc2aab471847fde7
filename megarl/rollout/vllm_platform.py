"""What vLLM needs of its process, and what it must not leave behind. Import this before vLLM; `import_vllm` checks the version.

vLLM runs inside the training ranks (its `external_launcher` executor). Traps met there, and where each is handled: names of shared
memory segments (`private_shared_memory`), an illegal instruction of small bf16 products (`parallel.device.prepare`), random states
(`VllmEngine` keeps them), the default process group destroyed at engine shutdown (`VllmEngine` ends it its own way), changed
environment variables (`launcher_environment`).
"""

import contextlib
import glob
import logging
import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
import torch._dynamo

from megarl.errors import ConfigError, SetupError
from megarl.parallel import device

SUPPORTED_VLLM = "0.32"

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_PLUGINS": "",  # nothing that happens to be installed beside vLLM is loaded into it
}
_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CONFIGURE_LOGGING": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRITON_F32_DEFAULT": "ieee",  # attention of an fp32 model on a GPU: Triton would multiply in TF32, 10 bits of mantissa
}

# Variables that vLLM rewrites for worker processes that we do not start; others read them later.
_KEPT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LD_PRELOAD")


def import_vllm() -> ModuleType:
    """vLLM, imported into a process that is prepared for it. Raises `SetupError` for a missing or untried version."""
    device.prepare()
    os.environ.update(_SETTINGS)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE") == "":
        del os.environ["VLLM_CPU_KVCACHE_SPACE"]  # vLLM parses the empty string as a number
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op.*")
    # Some modules speak before vLLM has read its logging level.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    try:
        import vllm
    except ImportError as error:
        raise SetupError(f"vLLM cannot be imported ({error}); install it with launch/install.sh") from None
    if not vllm.__version__.startswith(f"{SUPPORTED_VLLM}."):
        raise SetupError(
            f"vLLM {vllm.__version__} is installed; megarl was tested with {SUPPORTED_VLLM}.x, and what it writes weights into changes"
            f" between releases: run launch/install.sh, or pin vllm~={SUPPORTED_VLLM}.0 (vllm-cpu=={SUPPORTED_VLLM}.0 without a GPU)"
        )
    if not device.is_cuda():
        # Two small functions of the sampler would be compiled at the first token: seconds, and a C++ compiler the host may not have.
        torch._dynamo.config.disable = True
    return vllm


def check_head_dim(head_dim: int) -> None:
    """Raises `ConfigError` for a head width this host's attention cannot run; on a CPU vLLM would fail in the first forward pass."""
    if device.is_cuda():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    widths = CPUAttentionBackend.get_supported_head_sizes()
    if head_dim not in widths:
        raise ConfigError(f"the model's head_dim is {head_dim}; on a CPU vLLM computes {', '.join(map(str, widths))}: change config.json")


@contextlib.contextmanager
def launcher_environment(rank: int, world_size: int, local_rank: int) -> Iterator[None]:
    """The variables vLLM's external launcher reads, set while the engine is built and put back afterwards."""
    before = {name: os.environ.get(name) for name in _KEPT}
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def new_job_key() -> int:
    """A random number that sets this job's shared memory apart from that of others on the host."""
    return secrets.randbits(48)


@contextlib.contextmanager
def private_shared_memory(job_key: int) -> Iterator[None]:
    """Names vLLM's CPU shared memory by job and host while the engine is built, then removes the names.

    The names vLLM would choose collide between jobs of one host and outlive them; and ranks of two hosts would choose the same name
    and believe that they share memory (with different names vLLM falls back to gloo). Mapped segments stay valid without a name, so
    nothing is left behind however the job ends. On return every rank of a tensor-parallel group has mapped its segments.
    """
    if device.is_cuda():
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    prefix = f"megarl-{job_key:012x}"
    original = _CPUSHMDistributed.make_group_name

    def make_group_name(communicator) -> str:
        group = f"{communicator.unique_name}-{'-'.join(str(rank) for rank in communicator.ranks)}".replace("/", "_")
        return f"{prefix}-{socket.gethostname()[:64]}-{group}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(original)
        for path in glob.glob(f"/dev/shm/{prefix}*"):
            with contextlib.suppress(FileNotFoundError):  # another rank of this host was faster
                os.unlink(path)
