"""The quickstart's world: addition of two two-digit numbers, as data for every stage, a tokenizer and a small model's config.

    python -m megarl.quickstart.make_data OUT --seed 0

A prompt is `47+85=`, its answer three digits (`132`). Of the 10,000 problems, 8,000 are for training and 1,000 are held out. The
demonstrations come from a careless writer, who forgets six carries out of ten: a model that imitates them knows how to add and
what carrying is, but its likeliest answer to most problems with a carry is wrong, however long it imitates. Which answers are better is
said by the preferences and the verifier, as in the course this quickstart is a small copy of (Ouyang et al. 2022). The tokenizer
has one token a character, the same in every run. Writes into OUT:

    model/config.json           a Llama of about half a million parameters
    tokenizer.model             sentencepiece
    sft.jsonl                   training problems with careless answers: prompt, response
    preferences.jsonl           training problems with the right and a wrong answer: prompt, chosen, rejected
    heldout_preferences.jsonl   the same of the held-out problems
    prompts.jsonl, heldout.jsonl    problems to sample from and to be judged on: prompt, answer
"""

import argparse
import contextlib
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

NUM_TRAIN = 8000
NUM_HELDOUT = 1000
FORGOTTEN = 0.6  # how often the writer of the demonstrations forgets a carry
OTHER_SLIPS = (-100, -10, -2, -1, 1, 2, 10, 100)  # what else a rejected answer may be off by
Problem = tuple[int, int]

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "initializer_range": 0.06,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": 16,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make_data(directory: Path, seed: int) -> None:
    """Write the files listed above; the same seed writes the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    problems = [(a, b) for a in range(100) for b in range(100)]
    rng.shuffle(problems)
    train, heldout = problems[:NUM_TRAIN], problems[NUM_TRAIN : NUM_TRAIN + NUM_HELDOUT]
    _write_lines(directory / "sft.jsonl", ({"prompt": question(p), "response": answer(careless_sum(p, rng))} for p in train))
    _write_lines(directory / "preferences.jsonl", (preference(p, rng) for p in train))
    _write_lines(directory / "heldout_preferences.jsonl", (preference(p, rng) for p in heldout))
    _write_lines(directory / "prompts.jsonl", ({"prompt": question(p), "answer": answer(sum(p))} for p in train))
    _write_lines(directory / "heldout.jsonl", ({"prompt": question(p), "answer": answer(sum(p))} for p in heldout))
    train_tokenizer(directory / "tokenizer.model")
    (directory / "model").mkdir(exist_ok=True)
    (directory / "model" / "config.json").write_text(json.dumps(MODEL_CONFIG, indent=2) + "\n", encoding="utf-8")


def question(problem: Problem) -> str:
    """The prompt text."""
    return f"{problem[0]:02d}+{problem[1]:02d}="


def answer(total: int) -> str:
    """The response text."""
    return f"{total:03d}"


def careless_sum(problem: Problem, rng: random.Random) -> int:
    """The sum as the writer of the demonstrations makes it: each carry forgotten with probability `FORGOTTEN`."""
    return written_sum(problem, forget_ones=rng.random() < FORGOTTEN, forget_tens=rng.random() < FORGOTTEN)


def written_sum(problem: Problem, forget_ones: bool, forget_tens: bool) -> int:
    """Column addition in which the carry out of the ones, or out of the tens, may be forgotten."""
    carry, ones = divmod(problem[0] % 10 + problem[1] % 10, 10)
    hundreds, tens = divmod(problem[0] // 10 + problem[1] // 10 + carry * (not forget_ones), 10)
    return 100 * hundreds * (not forget_tens) + 10 * tens + ones


def preference(problem: Problem, rng: random.Random) -> dict[str, str]:
    """One preference line."""
    return {"prompt": question(problem), "chosen": answer(sum(problem)), "rejected": answer(plausible_error(problem, rng))}


def plausible_error(problem: Problem, rng: random.Random) -> int:
    """A wrong sum: three times in four one with a forgotten carry, where the problem has any, else another slip."""
    total = sum(problem)
    forgetful = {written_sum(problem, ones, tens) for ones in (False, True) for tens in (False, True)} - {total}
    if forgetful and rng.random() < 0.75:
        return rng.choice(sorted(forgetful))
    return rng.choice([total + slip for slip in OTHER_SLIPS if 0 <= total + slip <= 999])


def train_tokenizer(model_file: Path) -> None:
    """A sentencepiece model over `0123456789+=`: pad 0, end-of-text 1, unknown 2, no begin-of-text, digits 3 to 12."""
    characters = "0123456789+="
    model = io.BytesIO()
    # The trainer orders equally frequent characters by code point, so each digit is given a different count on purpose.
    sentences = [character * (len(characters) - i) for i, character in enumerate(characters)] * 50
    with contextlib.redirect_stderr(io.StringIO()):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="char",
            vocab_size=len(characters) + 3,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    model_file.write_bytes(model.getvalue())


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Write the quickstart's data, tokenizer and model config.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_data(arguments.directory, arguments.seed)


if __name__ == "__main__":
    main()
