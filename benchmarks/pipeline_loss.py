"""Step time of the policy update on two pipeline stages: the head on the last stage against the head shared by both.

Two actors with equal weights live in the same two ranks and take turns, step by step, on the same experience: the one thing that differs is
`parallel.head`. One shape has an output layer worth more than two layers, the other a small one. Logits are measured where they are made.
"""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from benchmarks.table import main
from megarl.config import PpoRun
from megarl.metrics import Metrics
from megarl.models import vocabulary
from megarl.models.family import spec_from_hf_config
from megarl.models.head_choice import layer_weights
from megarl.models.random_weights import RandomSource
from megarl.models.spec import ModelSpec
from megarl.parallel import groups
from megarl.parallel.schedule import in_flight_bounds, last_stage_costs, plan_schedule, sharded_costs, simulate
from megarl.ppo.roles import Actor
from megarl.records import Experience
from tests.ranks import run_ranks

LAYERS, WIDTH, FFN, HEADS = 4, 256, 704, 4
VOCABULARIES = {"large head": 12288, "small head": 512}
PROMPT, RESPONSE, ROWS, MICROBATCH = 32, 224, 16, 2
KEYS = ("step_s", "busy_share", "logits_bytes")
HEADS_COMPARED = ("last_stage", "sharded")


def model_spec(vocab_size: int, layers: int = LAYERS, width: int = WIDTH) -> ModelSpec:
    """A small Llama."""
    return spec_from_hf_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": FFN,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": PROMPT + RESPONSE,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }
    )


def make_run(parallel: Mapping[str, Any], num_rows: int) -> PpoRun:
    """The update of a whole rollout in one minibatch."""
    model = {"path": "model"}
    return PpoRun.model_validate(
        {
            "output_dir": "out",
            "tokenizer": "tokenizer",
            "precision": "fp32",
            "parallel": {"microbatch_size": MICROBATCH, **parallel},
            "actor": model,
            "critic": model,
            "rewards": [{"kind": "exact"}],
            "data": {"path": "prompts.jsonl"},
            "rollout": {"prompts_per_step": num_rows, "max_response_tokens": RESPONSE},
            "ppo": {"total_steps": 1000, "minibatch_size": num_rows, "entropy_coef": 0.01},
        }
    )


def experience(vocab_size: int, num_rows: int) -> Experience:
    """Made-up rollouts of full length."""
    generator = torch.Generator().manual_seed(0)
    shape, num_tokens = (num_rows, PROMPT + RESPONSE), PROMPT + RESPONSE

    def noise(*size):
        return torch.randn(*size, generator=generator)

    return Experience(
        token_ids=torch.randint(0, vocab_size, shape, generator=generator),
        lengths=torch.full((num_rows,), num_tokens),
        response_mask=(torch.arange(num_tokens) >= PROMPT).expand(shape).clone(),
        rollout_logprobs=noise(*shape),
        rewards=noise(num_rows),
        truncated=torch.zeros(num_rows, dtype=torch.bool),
        group_ids=torch.arange(num_rows),
        sample_ids=torch.arange(num_rows),
        baselines=torch.zeros(num_rows),
        baseline_truncated=torch.zeros(num_rows, dtype=torch.bool),
        ages=torch.zeros(shape, dtype=torch.int64),
        must_go_on=torch.zeros(shape, dtype=torch.bool),
        old_logprobs=noise(*shape) - 9,
        ref_logprobs=noise(*shape) - 9,
        values=noise(*shape),
        token_rewards=noise(*shape),
        advantages=noise(*shape),
        returns=noise(*shape),
    )


class Meter:
    """Largest block of logits and seconds of work of this rank since the last reset, measured around the functions that do it."""

    def __init__(self) -> None:
        self.reset()
        make_logits = vocabulary._tempered_logits

        def measured(*arguments: Any) -> torch.Tensor:
            logits = make_logits(*arguments)
            self.logits_bytes = max(self.logits_bytes, logits.numel() * logits.element_size())
            return logits

        vocabulary._tempered_logits = measured

    def reset(self) -> None:
        self.logits_bytes = 0
        self.cpu_s = time.process_time()
        self.wall_s = time.perf_counter()

    def read(self) -> dict[str, float]:
        wall_s, cpu_s = time.perf_counter() - self.wall_s, time.process_time() - self.cpu_s
        return {"step_s": wall_s, "busy_share": cpu_s / wall_s, "logits_bytes": self.logits_bytes}


def alternate(rank: int, world_size: int, vocab_size: int, num_rows: int, num_steps: int) -> dict[str, list[dict[str, float]]]:
    """Steps of both actors in turn, after two of each that do not count. Entered by both ranks."""
    spec, actors = model_spec(vocab_size), {}
    runs = {head: make_run({"pipeline": world_size, "head": head}, num_rows) for head in HEADS_COMPARED}
    layout = groups.initialize(runs[HEADS_COMPARED[0]].parallel, seed=0)
    for head, run in runs.items():
        actors[head] = Actor(spec, run, layout, RandomSource(spec.table("actor"), 0))
    batch, meter = experience(vocab_size, num_rows), Meter()
    seen: dict[str, list[dict[str, float]]] = {head: [] for head in HEADS_COMPARED}
    losses: dict[str, Metrics] = {}
    for step in range(num_steps + 2):
        for head in HEADS_COMPARED if step % 2 else reversed(HEADS_COMPARED):
            torch.distributed.barrier()
            meter.reset()
            losses[head] = actors[head].update(batch)
            torch.distributed.barrier()
            if step >= 2:
                seen[head].append(meter.read())
    values = {head: metrics.values_by_name() for head, metrics in losses.items()}
    difference = abs(values["sharded"]["actor/loss"] - values["last_stage"]["actor/loss"])
    assert difference < 1e-4 * max(1.0, abs(values["last_stage"]["actor/loss"])), "the two heads must learn the same"
    return seen


def row(name: str, vocab_size: int, num_rows: int, num_steps: int) -> dict[str, Any]:
    """One shape: medians of both heads, and what the simulator says of the same work."""
    spec = model_spec(vocab_size)
    ranks = run_ranks(alternate, 2, vocab_size, num_rows, num_steps, timeout_s=900)
    last, shared = ({key: [median(step[key] for step in rank[head]) for rank in ranks] for key in KEYS} for head in HEADS_COMPARED)
    pairs = zip(ranks[0]["last_stage"], ranks[0]["sharded"], strict=True)
    head_layers = vocab_size * WIDTH / layer_weights(spec)
    return {
        "shape": name,
        "head_layers": head_layers,
        "last_stage_s": last["step_s"][0],
        "sharded_s": shared["step_s"][0],
        "step_time_ratio": median(a["step_s"] / b["step_s"] for a, b in pairs),
        "simulated_ratio": simulated_ratio(head_layers, num_rows // MICROBATCH),
        "logits_ratio": max(last["logits_bytes"]) / max(shared["logits_bytes"]),
        "last_stage_logits_mib": max(last["logits_bytes"]) / 2**20,
        "sharded_logits_mib": max(shared["logits_bytes"]) / 2**20,
        "last_stage_busy": [round(share, 2) for share in last["busy_share"]],
        "sharded_busy": [round(share, 2) for share in shared["busy_share"]],
    }


def simulated_ratio(head_layers: float, num_microbatches: int) -> float:
    """Makespans of both schedules at latency 0. On the last stage backward computes the logits again: four forwards in all, not three."""
    head = head_layers * RESPONSE / (PROMPT + RESPONSE)
    stock, shared = last_stage_costs((LAYERS / 2,) * 2, head * 4 / 3), sharded_costs((LAYERS / 2,) * 2, head)
    stock_time = simulate(plan_schedule(stock, num_microbatches, in_flight_bounds(2, 0), "BHF"), stock).makespan
    return stock_time / simulate(plan_schedule(shared, num_microbatches), shared).makespan


def measure(quick: bool) -> Mapping[str, Any]:
    rows = [row(name, vocab_size, ROWS, 3 if quick else 9) for name, vocab_size in VOCABULARIES.items()]
    large, small = rows
    return {
        "heads": rows,
        "step_time_ratio": large["step_time_ratio"],
        "peak_logits_ratio": large["logits_ratio"],
        "small_head_ratio": small["step_time_ratio"],
    }


if __name__ == "__main__":
    main("pipeline_loss", __doc__.splitlines()[0], measure)
