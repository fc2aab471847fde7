"""CUDA host or CPU host: the only file that knows how Megatron-Core runs where there is no GPU.

Call `prepare()` before the first import of Megatron-Core. On a CUDA host it changes nothing. On a CPU host it gives Megatron the
few names of `torch.cuda` that it uses without asking: a current device, streams that do nothing, random states kept by the CPU
generator, and factory functions that read `device="cuda"` as the CPU.
"""

import contextlib
import functools
import importlib.util
import logging
import random
import warnings
from collections.abc import Callable, Iterator

import numpy
import torch
from torch.jit._builtins import _find_builtin, _register_builtin
from torch.utils._device import _device_constructors

from megarl.errors import CheckpointError

CPU = torch.device("cpu")

# Warnings Megatron-Core gives on every start about packages this host does not have, and about its own defaults.
NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    ".*fused weight gradient.*",
    ".*Triton.*",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    ".*is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
    "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated",
    "`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # of whole experts
    "If you are using transformer_engine as the transformer implementation",
)

# Functions to which Megatron-Core passes the literal device="cuda".
FACTORIES = ("ones", "tensor", "zeros")


@functools.cache
def is_cuda() -> bool:
    """True when this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank's tensors. On a GPU host `groups.initialize` has chosen it."""
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda() else CPU


def process_group_backend() -> str:
    """Backend of the default process group; with GPUs, CPU tensors still travel through gloo."""
    return "cpu:gloo,cuda:nccl" if is_cuda() else "gloo"


@functools.cache
def has_transformer_engine() -> bool:
    """True when Transformer Engine's layers can be used: a GPU, the package, and an import that works."""
    if not is_cuda() or importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError):  # a build for another CUDA or torch version
        return False
    return True


@functools.cache
def has_gradient_accumulation_fusion() -> bool:
    """True when NVIDIA apex's fused weight-gradient kernel is installed."""
    return is_cuda() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def synchronize() -> None:
    """Wait until this rank's device has finished its queued work."""
    if is_cuda():
        torch.cuda.synchronize()


def release_cached_memory() -> None:
    """Give memory that torch keeps for later tensors back to the GPU: vLLM takes its own from the driver."""
    if is_cuda():
        torch.cuda.empty_cache()


@functools.cache
def prepare() -> None:
    """Make Megatron-Core importable and runnable on this host. Idempotent; call it before importing Megatron-Core."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    if is_cuda():
        return
    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()  # small bf16 products die with an illegal instruction when the kernel was never asked for AMX
    _stand_in_for_streams()
    _stand_in_for_random_states()
    torch.cuda.current_device = lambda: CPU
    torch.cuda.empty_cache = lambda: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.type = _type_with_cuda_names(torch.Tensor.type)
    # `with torch.device(...)` knows the factories by identity and looks them up once: it must see the originals, or it does nothing.
    _device_constructors()
    for name in FACTORIES:
        factory = getattr(torch, name)
        wrapped = _on_cpu(factory)
        _register_builtin(wrapped, _find_builtin(factory))  # so that torch.jit.script still knows it
        setattr(torch, name, wrapped)


class _Stream:
    """A stream or event of a device that runs everything at once."""

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs) -> None:
        pass

    wait_stream = wait_event = record = record_event = synchronize = wait = _nothing


def _stand_in_for_streams() -> None:
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.current_stream = torch.cuda.default_stream = _Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None


def _stand_in_for_random_states() -> None:
    def get_rng_state(device=None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device=None) -> None:
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_rng_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_rng_state
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.default_generators = {CPU: torch.default_generator}
    torch.cuda._lazy_call = lambda function, **kwargs: function()


def _on_cpu(factory: Callable) -> Callable:
    """`factory`, except that a device called "cuda" means the CPU, and that memory is never pinned."""

    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # needs a GPU's driver
        return factory(*args, **kwargs)

    return on_cpu


def _type_with_cuda_names(tensor_type: Callable) -> Callable:
    """`Tensor.type` that answers with the names Megatron's optimizers look for, `torch.cuda.FloatTensor` and its siblings."""

    @functools.wraps(tensor_type)
    def with_cuda_names(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        name = tensor_type(self)
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)

    return with_cuda_names


def random_states() -> dict[str, torch.Tensor]:
    """Every random state of this rank as tensors: Python, numpy, torch, the GPU's, Megatron's model-parallel states."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = numpy.random.get_state()
    states = {
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.keys": torch.from_numpy(keys.astype(numpy.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.cached": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if is_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    states.update({f"megatron.{name}": state.clone() for name, state in _tracker().get_states().items()})
    return states


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Set every random state of this rank to what `random_states` returned.

    Raises `CheckpointError` for the states of a host of the other kind: GPU and CPU generators have nothing in common.
    """
    if ("cuda" in states) != is_cuda():
        theirs, ours = ("a GPU host", "a CPU host") if "cuda" in states else ("a CPU host", "a GPU host")
        raise CheckpointError(
            f"the random states were saved on {theirs}, this is {ours}: continue where they were saved, or start a new output_dir from"
            " the checkpoint's weights (model path)"
        )
    gauss = states["python.gauss"]
    random.setstate((3, tuple(states["python.words"].tolist()), gauss.item() if gauss.numel() else None))
    position, has_gauss = states["numpy.position"].tolist()
    keys = states["numpy.keys"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, position, has_gauss, states["numpy.cached"].item()))
    torch.set_rng_state(states["torch"])
    if is_cuda():
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "megatron."
    _tracker().set_states({name.removeprefix(prefix): state.clone() for name, state in states.items() if name.startswith(prefix)})


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever the body draws or reseeds, the random states afterwards are those before."""
    states = random_states()
    try:
        yield
    finally:
        restore_random_states(states)


def _tracker():
    """Megatron's tracker of model-parallel random states. Imported late: Megatron must find a prepared host."""
    prepare()
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()
