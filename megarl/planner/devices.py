"""GPUs that a plan can be made for, and the assumptions that stand between a data sheet and a run."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory as its driver shows it; speeds of its data sheet, dense bf16, one direction of each link, in a second."""

    name: str
    memory_bytes: int
    flops: float  # bf16 with float32 accumulation, without sparsity
    memory_bandwidth: float  # bytes
    peer_bandwidth: float  # bytes to the node's other GPUs
    host_bandwidth: float  # bytes to and from host memory
    network_bandwidth: float  # bytes to other nodes: a port a GPU, as such nodes usually have
    source: str


def _gpu(name: str, gib: float, tflops: float, memory_gb: float, peer_gb: float, host_gb: float, network_gb: float, source: str) -> Gpu:
    return Gpu(name, int(gib * GIB), tflops * 1e12, memory_gb * 1e9, peer_gb * 1e9, host_gb * 1e9, network_gb * 1e9, source)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 39.4, 312, 1555, 300, 32, 25, "NVIDIA A100 data sheet, SXM4 40 GB"),
        _gpu("a100-80gb", 79.2, 312, 2039, 300, 32, 25, "NVIDIA A100 data sheet, SXM4 80 GB"),
        _gpu("b200-180gb", 178.4, 2250, 7700, 900, 64, 50, "NVIDIA HGX B200 data sheet"),
        _gpu("h100-80gb", 79.2, 989, 3350, 450, 64, 50, "NVIDIA H100 data sheet, SXM5"),
        _gpu("h200-141gb", 139.8, 989, 4800, 450, 64, 50, "NVIDIA H200 data sheet, SXM"),
        _gpu("l40s-48gb", 44.4, 362, 864, 32, 32, 25, "NVIDIA L40S data sheet; PCIe between GPUs"),
    )
}
DEFAULT_GPU = "h100-80gb"


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted. Printed with it."""

    reserved_bytes: int = 2 * GIB  # CUDA context, cuBLAS and NCCL buffers of a process
    fragmentation: float = 0.04  # of what a phase holds, lost between blocks of torch's allocator
    learning_efficiency: float = 0.40  # of the GPU's bf16 rate while a stage multiplies (Megatron-LM tells 0.41 to 0.47 of pre-training)
    prefill_efficiency: float = 0.50  # the same of the sampler reading prompts
    decode_efficiency: float = 0.60  # of the memory bandwidth while the sampler writes tokens
    link_efficiency: float = 0.75  # of NVLink, PCIe and network
    decode_step_s: float = 2e-3  # of the sampler for a token of every sequence, beside reading memory: scheduler, launches, sampling
    collective_s: float = 20e-6  # latency of one collective between tensor-parallel ranks
    cuda_graph_bytes: int = GIB  # of the sampler, awake or asleep, unless rollout.eager
