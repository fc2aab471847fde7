"""Does the export say what was trained? Its logits in transformers against Megatron's, and vLLM's greedy answers against transformers'.

    python -m megarl.quickstart.verify EXPORT HELDOUT TRAINED MAX_RESPONSE_TOKENS OUT

The tokenizer is the export's own. Writes {"max_abs_logit_difference", "vllm_greedy_agreement"} as JSON to OUT.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megarl.data.tokenizers import load_tokenizer
from megarl.quickstart.probes import read_probes
from megarl.records import Prompt, TokenBatch
from megarl.rollout.vllm_directory import generate_greedy

NUM_GREEDY = 256  # prompts answered by both


def max_abs_difference(model: PreTrainedModel, sequences: TokenBatch, trained: Tensor) -> float:
    """Largest |logit difference| over all positions of all sequences that hold a token. `trained` is f32[B, T, V]."""
    with torch.no_grad():
        exported = model(sequences.token_ids).logits.float()
    is_token = torch.arange(sequences.token_ids.shape[1]) < sequences.lengths[:, None]
    return float((exported - trained)[is_token].abs().max())


def greedy_answers(model: PreTrainedModel, prompts: list[Prompt], max_tokens: int, eos_id: int) -> list[tuple[int, ...]]:
    """The likeliest response to each prompt by transformers; end-of-text belongs to it. Prompts of equal length go together, unpadded."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt.token_ids)].append(i)
    answers: dict[int, tuple[int, ...]] = {}
    for length, members in by_length.items():
        ids = torch.tensor([prompts[i].token_ids for i in members])
        settings = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": eos_id, "pad_token_id": eos_id}
        for i, row in zip(members, model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, length:].tolist()):
            answers[i] = tuple(row[: row.index(eos_id) + 1] if eos_id in row else row)
    return [answers[i] for i in range(len(prompts))]


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Compare an export with the trained model, in transformers and in vLLM.")
    for name in ("export", "heldout", "trained"):
        parser.add_argument(name, type=Path)
    parser.add_argument("max_response_tokens", type=int)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.export)
    probes = read_probes(arguments.heldout, tokenizer)  # the sequences whose logits the trained model wrote
    model = AutoModelForCausalLM.from_pretrained(arguments.export, dtype=torch.float32, local_files_only=True).eval()
    difference = max_abs_difference(model, probes.sequences, load_file(arguments.trained)["logits"])
    tried = probes.prompts[:NUM_GREEDY]
    expected = greedy_answers(model, tried, arguments.max_response_tokens, tokenizer.eos_id)
    prompts = [prompt.token_ids for prompt in tried]
    found = generate_greedy(arguments.export, prompts, arguments.max_response_tokens, [tokenizer.eos_id])
    agreement = sum(a == b for a, b in zip(expected, found)) / len(prompts)
    arguments.out.write_text(json.dumps({"max_abs_logit_difference": difference, "vllm_greedy_agreement": agreement}, indent=2) + "\n")


if __name__ == "__main__":
    main()
