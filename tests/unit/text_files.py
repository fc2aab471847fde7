"""Small files that the data tests read: JSONL, a sentencepiece model, Hugging Face tokenizer directories."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Strips all but the last assistant turn, as templates of reasoning models do.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_lines(path: Path, rows: list) -> Path:
    """A JSONL file; text rows are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def sentencepiece_file(path: Path, sentences: list[str], **options) -> Path:
    """A trained sentencepiece model at `path`."""
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 120, "hard_vocab_limit": False, "pad_id": 3, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **{**defaults, **options})
    path.write_bytes(model.getvalue())
    return path


def sentencepiece_letters(path: Path) -> Path:
    """A sentencepiece model over the letters a to h, with a begin-of-text token."""
    return sentencepiece_file(path, ["abcdefgh"] * 50, model_type="char", add_dummy_prefix=False, vocab_size=12)


def character_tokenizer_directory(directory: Path, template: str | None = CHATML, **special) -> Path:
    """A Hugging Face directory whose tokens are ASCII characters, with ChatML's special tokens."""
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    fast = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"], **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory
