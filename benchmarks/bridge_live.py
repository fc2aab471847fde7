"""Real transfers of weights between gloo ranks into vLLM: the bridge against ways that assemble whole tensors, alternating in one run.

Two ranks train and sample in bf16. All contenders end with the same state in vLLM, which is compared after each of them bit for bit:

* `bridge`: `WeightSync.push`, without and with digests of every slice;
* `gather all`: every rank gets the whole model, then vLLM's `reload_weights`;
* `gather streamed`: the same a few tensors at a time, while vLLM loads them;
* `rank 0 broadcasts`: rank 0 assembles a few tensors at a time and broadcasts them, while vLLM loads them.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import table
from tests.ranks import run_ranks

MODELS = {
    "92 M": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10, "num_key_value_heads": 2},
    "495 M": {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 24, "num_attention_heads": 20, "num_key_value_heads": 4},
}
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LAYOUTS = {"TP2 -> TP2": ({"tensor": 2}, 2), "PP2 -> TP2": ({"pipeline": 2}, 2), "TP2 -> 2 x TP1": ({"tensor": 2}, 1)}
TARGETS = {"TP2 -> TP2": 3.0, "PP2 -> TP2": 1.5}
BUCKET_BYTES = 32 << 20
PROMPT, MAX_LEN, NUM_TOKENS = list(range(5, 37)), 64, 8


def live(quick: bool) -> list[dict[str, Any]]:
    """A row for each model, layout and contender: seconds, times the bridge's, bytes received and extra memory of the busier rank."""
    rows = []
    for model in list(MODELS)[: 1 if quick else None]:
        for layout, (parallel, generator) in LAYOUTS.items():
            ranks = run_ranks(compare, 2, MODELS[model], parallel, generator, 3 if quick else 7, timeout_s=1500)
            rows += [{"model": model, "layout": layout, **row} for row in merged(ranks, TARGETS.get(layout))]
    return rows


def merged(ranks: Sequence[Mapping[str, dict]], target: float | None) -> list[dict[str, Any]]:
    """The slower rank's seconds and the larger one's bytes, contender by contender."""
    largest = {name: {key: max(rank[name][key] for rank in ranks) for key in ranks[0][name]} for name in ranks[0]}
    fastest = largest["bridge"]["s"]
    return [
        {
            "contender": name,
            "ms": round(1e3 * numbers["s"], 1),
            "over_bridge": round(numbers["s"] / fastest, 2),
            "packing_ms": round(1e3 * numbers["packing_s"], 1),
            "received_MB": round(numbers["received_bytes"] / 1e6, 1),
            "extra_MB": round(numbers["extra_bytes"] / 1e6, 1),
            "target": target if target and name.startswith(("gather", "rank 0")) else "",
        }
        for name, numbers in largest.items()
    ]


# --- on every rank ---


def compare(rank: int, world_size: int, sizes: dict, parallel: dict, generator: int, repeats: int) -> dict[str, dict[str, float]]:
    """Numbers of this rank for every contender."""
    from megarl.bridge.sync import WeightSync
    from megarl.config import ParallelConfig, RolloutConfig
    from megarl.models.build import build_model
    from megarl.models.family import spec_from_hf_config
    from megarl.models.pieces import load_pieces, source_pieces
    from megarl.models.random_weights import RandomSource
    from megarl.parallel import groups
    from megarl.parallel.layout import RolloutLayout
    from megarl.rollout.vllm_engine import VllmEngine

    training = ParallelConfig(**parallel)
    layout = groups.initialize(training, seed=0)
    spec = spec_from_hf_config(COMMON | sizes)
    rollout = RolloutConfig(prompts_per_step=1, max_response_tokens=NUM_TOKENS, kv_cache_bytes=8 << 20)
    engines = [VllmEngine(spec, rollout, RolloutLayout(layout, generator), "bf16", MAX_LEN) for _ in range(2)]
    owner = Owner(source_pieces(build_model(spec, "actor", training, "bf16", layout), spec.table("actor")))
    load_pieces(owner.pieces, RandomSource(spec.table("actor"), seed=0))
    plain = WeightSync(engines[0], layout, bucket_bytes=BUCKET_BYTES, verify_first=0)
    checked = WeightSync(engines[0], layout, bucket_bytes=BUCKET_BYTES, verify_first=1 << 30)
    assembly = Assembly(owner.pieces, spec.table("actor").hf_shapes)
    load = partial(reload, engines[1])
    contenders = {
        "bridge": lambda: plain.push(owner, 1),
        "bridge, digests": lambda: checked.push(owner, 1),
        "gather all": lambda: load(list(assembly.gathered())),
        "gather streamed": lambda: load(assembly.gathered()),
        "rank 0 broadcasts": lambda: load(assembly.broadcast()),
    }
    check_equal(contenders, owner, engines)
    seconds = table.alternating({name: partial(together, contender) for name, contender in contenders.items()}, repeats)
    return {name: {"s": seconds[name], **measured(contender, assembly)} for name, contender in contenders.items()}


@dataclass(frozen=True)
class Owner:
    """The trainer."""

    pieces: Sequence[Any]


def together(contender: Callable[[], Any]) -> Any:
    """From the moment all ranks start to the moment all are done."""
    dist.barrier()
    result = contender()
    dist.barrier()
    return result


def reload(engine: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """vLLM's own way to take new weights by their Hugging Face names, every rank its part."""
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    engine._llm.reset_prefix_cache()
    engine.policy_version = 1


class Assembly:
    """Whole Hugging Face tensors out of the ranks' pieces, in groups of tensors of about `BUCKET_BYTES`, in the model's order."""

    def __init__(self, pieces: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]):
        self.pieces, self.shapes, self.received_bytes = pieces, shapes, 0
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [(piece.hf_name, piece.box, piece.is_owner) for piece in pieces])
        self.held = everyone
        self.groups: list[list[str]] = [[]]
        room = BUCKET_BYTES
        for name, shape in shapes.items():
            size = 2 * torch.Size(shape).numel()
            if size > room and self.groups[-1]:
                self.groups.append([])
                room = BUCKET_BYTES
            self.groups[-1].append(name)
            room -= size

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """On every rank: each owner broadcasts what it holds of a group, in one message."""
        for names in self.groups:
            parts = [(rank, *self._packed(rank, names)) for rank in range(dist.get_world_size())]
            for rank, _, flat in parts:
                if flat.numel():
                    dist.broadcast(flat, rank)
                    self.received_bytes += 0 if rank == dist.get_rank() else flat.nbytes
            yield from self._assembled(names, parts).items()

    def broadcast(self) -> Iterator[tuple[str, Tensor]]:
        """On every rank: rank 0 collects a group from its owners and broadcasts whole tensors, in one message."""
        for names in self.groups:
            whole = {name: torch.empty(self.shapes[name], dtype=torch.bfloat16) for name in names}
            if dist.get_rank() == 0:
                parts = [(rank, *self._packed(rank, names)) for rank in range(dist.get_world_size())]
                for rank, _, flat in parts[1:]:
                    if flat.numel():
                        dist.recv(flat, rank)
                        self.received_bytes += flat.nbytes
                whole = self._assembled(names, parts)
            else:
                _, flat = self._packed(dist.get_rank(), names)
                if flat.numel():
                    dist.send(flat, 0)
            for tensor in whole.values():
                dist.broadcast(tensor, 0)
                self.received_bytes += 0 if dist.get_rank() == 0 else tensor.nbytes
            yield from whole.items()

    def _packed(self, rank: int, names: Sequence[str]) -> tuple[list[tuple[str, tuple]], Tensor]:
        """What `rank` owns of these tensors, and one buffer for it, filled on that rank."""
        boxes = [(index, name, box) for index, (name, box, is_owner) in enumerate(self.held[rank]) if is_owner and name in names]
        if rank == dist.get_rank():
            views = [self.pieces[index].view.reshape(-1) for index, _, _ in boxes]
            flat = torch.cat(views) if views else torch.empty(0, dtype=torch.bfloat16)
        else:
            flat = torch.empty(sum(_count(box) for _, _, box in boxes), dtype=torch.bfloat16)
        return [(name, box) for _, name, box in boxes], flat

    def _assembled(self, names: Sequence[str], parts: Sequence[tuple[int, list, Tensor]]) -> dict[str, Tensor]:
        whole = {name: torch.empty(self.shapes[name], dtype=torch.bfloat16) for name in names}
        for _, boxes, flat in parts:
            for (name, box), part in zip(boxes, flat.split([_count(box) for _, box in boxes]), strict=True):
                target = whole[name][tuple(slice(offset, offset + size) for offset, size in box)]
                target.copy_(part.view(target.shape))
        return whole


def _count(box: tuple) -> int:
    return torch.Size(size for _, size in box).numel()


# --- do they arrive at the same? ---


@torch.no_grad()
def check_equal(contenders: Mapping[str, Callable[[], Any]], owner: Owner, engines: Sequence[Any]) -> None:
    """Every contender brings new weights to its engine and another one the same to the other: both then compute the same bits."""
    for name, contender in contenders.items():
        for piece in owner.pieces:
            piece.view.mul_(-0.75)
        before = [computed(engine) for engine in engines]
        contender()
        contenders["gather all" if name.startswith("bridge") else "bridge"]()
        after = [computed(engine) for engine in engines]
        for key in before[0]:
            assert after[0][key].equal(after[1][key]), f"{name}: vLLM's {key} differs"
            assert "layers" not in key or not after[0][key].equal(before[0][key]), f"{name}: {key} is as before"
        samples = [engine._llm.generate([{"prompt_token_ids": PROMPT}], _greedy(), use_tqdm=False)[0].outputs[0] for engine in engines]
        assert samples[0].token_ids == samples[1].token_ids and list(samples[0].logprobs.logprobs) == list(samples[1].logprobs.logprobs)


def computed(engine: Any) -> dict[str, Tensor]:
    """What each weight of this rank's model does: live parameters, and packed ones times a few random rows."""
    model = engine._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    shapes = {name: place.canonical.shape for name, place in engine._endpoint._places.items()}
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.numel()}
    for name, module in model.named_modules():
        if hasattr(module, "cpu_linear"):
            rows = torch.randn(8, shapes[f"{name}.weight"][1], generator=torch.Generator().manual_seed(0)).bfloat16()
            found[f"{name} packed"] = module.cpu_linear(rows, module.weight, None)
    return found


def _greedy():
    from vllm import SamplingParams

    return SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, logprobs=0, flat_logprobs=True, ignore_eos=True, detokenize=False)


# --- what they take besides time ---


def measured(contender: Callable[[], Any], assembly: Assembly) -> dict[str, float]:
    """Bytes received, most memory in use above what was in use before, and seconds in vLLM's processing of loaded weights."""
    before = assembly.received_bytes
    with PeakMemory() as memory:
        report = together(contender)
    received = assembly.received_bytes - before if report is None else report.received_bytes
    with PackingTime() as packing:
        together(contender)
    return {"received_bytes": received, "extra_bytes": memory.extra_bytes, "packing_s": packing.seconds}


class PeakMemory(TorchDispatchMode):
    """The C library's bytes in use, asked after every operation: what allocates is an operation. Slow; time without it."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        self._before, self.extra_bytes = bytes_in_use(), 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.extra_bytes = max(self.extra_bytes, bytes_in_use() - self._before)
        return result


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def bytes_in_use() -> int:
    """Bytes that this process has allocated and not freed, whatever the allocator keeps for later (glibc)."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


class PackingTime:
    """Seconds spent in vLLM's processing of linear weights and embeddings after they are loaded, which every contender needs."""

    def __enter__(self) -> "PackingTime":
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        self.seconds = 0.0
        self._originals = {method: method.process_weights_after_loading for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)}
        for method, original in self._originals.items():
            method.process_weights_after_loading = self._timed(original)
        return self

    def _timed(self, original: Callable[..., None]) -> Callable[..., None]:
        def process(*args: Any) -> None:
            start = time.perf_counter()
            original(*args)
            self.seconds += time.perf_counter() - start

        return process

    def __exit__(self, *exception: object) -> None:
        for method, original in self._originals.items():
            method.process_weights_after_loading = original


if __name__ == "__main__":
    table.main("bridge_live", __doc__.splitlines()[0], lambda quick: {"live": live(quick)})
