"""Packed microbatches against padded ones on the lengths of real texts: padding, balance, and tokens a second of training.

`python -m benchmarks.packing --data FILE [--quick] [--json PATH]`

FILE is a JSONL of `question` and `answer` (GSM8K's train.jsonl). A sentencepiece tokenizer trained on FILE turns them into token ids. The
speed is that of whole optimizer steps of supervised fine-tuning on a small Llama, padded and packed alternating on the same batches,
with the same tokens in flight: a pack may hold as many tokens as an average padded microbatch.
"""

import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch

from benchmarks.table import alternating, main
from megarl.config import OptimizerConfig, ParallelConfig
from megarl.course.sft import imitation_loss
from megarl.data.batching import collate_demonstrations
from megarl.data.demonstrations import Demonstration
from megarl.data.pack_size import TILE
from megarl.data.packing import Cost, dealt, packed
from megarl.metrics import Metrics
from megarl.models.build import build_model
from megarl.models.family import spec_from_hf_config
from megarl.models.learner import Learner
from megarl.models.pieces import load_pieces, source_pieces
from megarl.models.random_weights import RandomSource
from megarl.models.replica import packing_of
from megarl.models.spec import quadratic_cost
from megarl.models.token_stats import LogprobHead
from megarl.parallel import device, groups
from megarl.records import DemonstrationBatch

VOCABULARY, BATCH, MICROBATCH, DATA_RANKS, TARGET = 2000, 64, 8, 4, 1.5
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def demonstrations(path: Path) -> list[Demonstration]:
    """Questions and answers of a file as token ids; the answers are learned."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for line in lines[:3000] for text in (line["question"], line["answer"])]),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    found = []
    for line in lines:
        question, answer = (tokenizer.encode(line[key]) for key in ("question", "answer"))
        question, answer = [tokenizer.bos_id(), *question], [*answer, tokenizer.eos_id()]
        found.append(Demonstration((*question, *answer), (*[False] * len(question), *[True] * len(answer))))
    return found


def padding(lengths: np.ndarray, max_tokens: int) -> list[dict[str, Any]]:
    """How much of what is computed is padding, for batches in file order: padded to the longest of the batch, and packed."""
    batches = [lengths[i : i + BATCH] for i in range(0, len(lengths) - BATCH + 1, BATCH)]
    computed = {"padded": sum(len(batch) * tiled(batch.max()) for batch in batches)}
    for budget in (max_tokens // 2, max_tokens, 2 * max_tokens):
        packs = [[batch[rows].sum() for rows in packed(batch, batch, budget)] for batch in batches]
        computed[f"packed, {budget} tokens"] = sum(len(sums) * tiled(max(sums)) for sums in packs)
    real = sum(int(batch.sum()) for batch in batches)
    return [{"microbatches": name, "real_tokens": real, "computed_tokens": n, "padding": 1 - real / n} for name, n in computed.items()]


def balance(lengths: np.ndarray, cost: Cost) -> list[dict[str, Any]]:
    """The work of the busiest data rank over the average one, mean over batches: equally many rows, and rows dealt by work."""
    costs = cost.of(lengths)
    batches = [costs[i : i + BATCH] for i in range(0, len(costs) - BATCH + 1, BATCH)]
    even = np.arange(BATCH) // (BATCH // DATA_RANKS)
    busiest = {"equally many rows": [], "dealt by work": []}
    for batch in batches:
        for ranks, found in zip((even, dealt(batch, DATA_RANKS)), busiest.values(), strict=True):
            found.append(np.bincount(ranks, weights=batch, minlength=DATA_RANKS).max() * DATA_RANKS / batch.sum())
    return [{"data_ranks": DATA_RANKS, "rows": name, "busiest_over_mean": float(np.mean(found))} for name, found in busiest.items()]


def tiled(num_tokens: int) -> int:
    """As megarl rounds lengths up."""
    return -(-int(num_tokens) // TILE) * TILE


def speed(rows: Sequence[Demonstration], max_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens a second of optimizer steps on these batches of `rows`."""
    parallel = ParallelConfig(microbatch_size=MICROBATCH, max_tokens_per_microbatch=max_tokens)
    layout = groups.initialize(parallel, seed=0)
    precision = "bf16" if device.is_cuda() else "fp32"
    spec = spec_from_hf_config(MODEL)
    chunks = build_model(spec, "actor", parallel, precision, layout)
    learner = Learner(chunks, OptimizerConfig(lr=1e-12), parallel, precision, layout, total_steps=1)  # both shall see the same weights
    load_pieces(source_pieces(learner.chunks, spec.table("actor")), RandomSource(spec.table("actor"), seed=0))
    learner.refresh_main_params()
    head = LogprobHead(parallel.logits_bytes, mask_field="loss_mask")
    batches = [collate_demonstrations(rows[i : i + BATCH], 0, TILE) for i in range(0, len(rows), BATCH)]
    losses: dict[str, float] = {}

    def train(name: str, packing: Any) -> None:
        learner.packing = packing
        total = sum((step(learner, head, batch) for batch in batches), Metrics())
        device.synchronize()
        losses[name] = total["loss"].value

    ways = {"padded": None, "packed": packing_of(spec, parallel)}
    seconds = alternating({name: partial(train, name, packing) for name, packing in ways.items()}, repeats)
    groups.shutdown()
    assert abs(losses["packed"] - losses["padded"]) < 1e-5 * losses["padded"] or precision == "bf16", losses
    tokens = sum(len(row.token_ids) for row in rows)
    return [{"microbatches": name, "s": s, "tokens_s": tokens / s, "loss": losses[name]} for name, s in seconds.items()]


def step(learner: Learner, head: LogprobHead, batch: DemonstrationBatch) -> Metrics:
    """One optimizer step."""
    return learner.step(batch, head, partial(imitation_loss, denominator=float(batch.loss_mask.sum())))


def measure(quick: bool, data: Path) -> Mapping[str, Any]:
    rows = demonstrations(data)
    lengths = np.array([len(row.token_ids) for row in rows])
    padded_to = np.mean([tiled(lengths[i : i + BATCH].max()) for i in range(0, len(lengths), BATCH)])
    max_tokens = tiled(MICROBATCH * padded_to)
    spread = padding(lengths, max_tokens)
    times = speed(rows[: BATCH * (1 if quick else 4)], max_tokens, 2 if quick else 5)
    return {
        "padding": spread,
        "balance": balance(lengths, Cost(quadratic_cost(spec_from_hf_config(MODEL)))),
        "speed": times,
        "texts": f"{len(rows)} of {data.name}: mean {lengths.mean():.0f} tokens, longest {lengths.max()}",
        "tokenizer": f"sentencepiece BPE of {VOCABULARY}, trained on the file",
        "batch": f"{BATCH} sequences, padded in microbatches of {MICROBATCH} or packed up to {max_tokens} tokens",
        "threads": torch.get_num_threads(),
        "padding_before": spread[0]["padding"],
        "padding_after": spread[2]["padding"],
        "tokens_s_ratio": times[1]["tokens_s"] / times[0]["tokens_s"],
        "target": TARGET,
    }


if __name__ == "__main__":
    main("packing", __doc__.splitlines()[0], measure, {"data": {"type": Path, "required": True, "help": "JSONL of question and answer"}})
