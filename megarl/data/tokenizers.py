"""Text to token ids and back: sentencepiece `.model` files and Hugging Face tokenizer directories behind one interface."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import jinja2
import sentencepiece
from transformers import AutoTokenizer

from megarl.data.sentencepiece_export import write_fast_tokenizer
from megarl.errors import DataError

Message = dict[str, str]


class Tokenizer(ABC):
    """What the rest of megarl asks of a tokenizer. Ids lie in [0, vocab_size).

    `bos_id` is None when sequences do not start with a special token, `pad_id` falls back to `eos_id`.
    """

    path: Path
    eos_id: int
    bos_id: int | None
    pad_id: int
    vocab_size: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone, no special tokens added."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`; special tokens are left out."""

    @abstractmethod
    def spelled(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids` with special tokens spelled out, for people to read."""

    @abstractmethod
    def render_chat(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        """Token ids of a chat through the tokenizer's template. Raises `DataError` when there is none or it refuses the chat."""

    @abstractmethod
    def save_for_export(self, directory: Path) -> None:
        """Write files from which `transformers.AutoTokenizer` makes a tokenizer with the same ids for the same text."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt: the begin-of-text token where the tokenizer has one, then the text."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def decode_response(self, token_ids: Sequence[int]) -> str:
        """Text of a response up to its first end-of-text token."""
        ids = list(token_ids)
        return self.decode(ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file. It has no chat template."""

    def __init__(self, path: Path):
        self.path = path
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(f"tokenizer {path}: not a sentencepiece model ({str(error).splitlines()[0]})") from error
        self.vocab_size = self._processor.vocab_size()
        if self._processor.eos_id() < 0:
            raise DataError(f"tokenizer {path}: no end-of-text token; expected a model trained with eos_id >= 0")
        self.eos_id = self._processor.eos_id()
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        # A model's vocabulary may be padded past the tokenizer's: such ids stand for no text.
        known = [int(i) for i in token_ids if int(i) < self.vocab_size]
        return self._processor.decode([i for i in known if not self._processor.is_control(i)])

    def spelled(self, token_ids: Sequence[int]) -> str:
        pieces = []
        for is_control, run in groupby(map(int, token_ids), key=self._processor.is_control):
            ids = list(run)
            pieces.append("".join(map(self._processor.id_to_piece, ids)) if is_control else self._processor.decode(ids))
        return "".join(pieces)

    def render_chat(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        raise DataError(
            f"tokenizer {self.path}: a sentencepiece file has no chat template; set data.chat_template=false and use plain"
            " prompts, or point `tokenizer` at a Hugging Face directory with a chat_template"
        )

    def save_for_export(self, directory: Path) -> None:
        write_fast_tokenizer(self.path, directory)


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face tokenizer directory. Code that comes with the directory is never run."""

    def __init__(self, path: Path):
        self.path = path
        _refuse_code(path)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            raise DataError(f"tokenizer {path}: transformers cannot load it ({_first_line(error)})") from error
        self.vocab_size = len(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise DataError(f"tokenizer {path}: no eos_token; name one in tokenizer_config.json")
        self.eos_id = self._tokenizer.eos_token_id
        starts = self._tokenizer("").input_ids[:1]
        self.bos_id = starts[0] if starts and starts[0] == self._tokenizer.bos_token_id else None
        self.pad_id = self.eos_id if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spelled(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def render_chat(self, messages: list[Message], add_generation_prompt: bool) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise DataError(f"tokenizer {self.path}: no chat_template; set data.chat_template=false or add one to the directory")
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
            )
        except jinja2.TemplateError as error:
            raise DataError(f"tokenizer {self.path}: the chat template refuses this chat ({_first_line(error)})") from error

    def save_for_export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(directory)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a sentencepiece `.model` file, or a Hugging Face directory.

    Raises `DataError` when it is missing, malformed, has no end-of-text token, or wants code from its directory to run.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".model":
            raise DataError(f"tokenizer {path}: expected a sentencepiece .model file or a Hugging Face directory")
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise DataError(f"tokenizer {path}: not found; expected a sentencepiece .model file or a Hugging Face directory")
    has_hf_files = (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()
    if not has_hf_files and (path / "tokenizer.model").is_file():
        return SentencePieceTokenizer(path / "tokenizer.model")
    if not has_hf_files:
        raise DataError(f"tokenizer {path}: the directory holds no tokenizer.json, tokenizer_config.json or tokenizer.model")
    return HuggingFaceTokenizer(path)


def stop_token_ids(tokenizer: Tokenizer, model_ends: Sequence[int]) -> tuple[int, ...]:
    """What ends a sampled response: the tokenizer's end-of-text, then the model's other end tokens that stand for no text.

    Models without the tokenizer's end-of-text among `model_ends` speak of another tokenizer, and only the tokenizer's counts.
    """
    if tokenizer.eos_id not in model_ends:
        return (tokenizer.eos_id,)
    others = [i for i in model_ends if i != tokenizer.eos_id and 0 <= i < tokenizer.vocab_size and not tokenizer.decode([i])]
    return (tokenizer.eos_id, *others)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int, model_path: Path, key: str) -> None:
    """Raise `DataError` unless every token id fits the model. `key` is the configuration key of the model, such as `actor.path`."""
    if tokenizer.vocab_size > model_vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens but {key}={model_path} has a vocabulary of {model_vocab_size}:"
            f" change `tokenizer` to the one the model was trained with, or `{key}`"
        )


def _refuse_code(path: Path) -> None:
    for name in ("tokenizer_config.json", "config.json"):
        try:
            config = json.loads((path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise DataError(f"tokenizer {path / name}: not readable as JSON ({_first_line(error)})") from error
        auto_map = config.get("auto_map", {}) if isinstance(config, dict) else {}
        if name == "tokenizer_config.json" and auto_map or "AutoTokenizer" in auto_map:
            raise DataError(f"tokenizer {path / name}: auto_map asks to run code from the directory, which megarl never does; remove it")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
