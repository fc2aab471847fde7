import json
import random
from itertools import product
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megarl.data.tokenizers import check_vocabulary, load_tokenizer, stop_token_ids
from megarl.errors import DataError
from tests.unit.text_files import CHATML, character_tokenizer_directory, sentencepiece_file

rng = random.Random(0)
WORDS = ["".join(rng.choice("abcdefgh\u00e9\u00df\u4e2d") for _ in range(rng.randint(1, 7))) for _ in range(400)]
SENTENCES = [" ".join(rng.choices(WORDS, k=8)) + " 12." for _ in range(400)]
CHARACTERS = [*"abcdef  12.\n\u00df\u00e9\u4e2d\u03a9", "\U0001f600", "<sep>"]
TEXTS = ["".join(rng.choices(CHARACTERS, k=rng.randint(0, 25))) for _ in range(300)]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def sentencepiece_kinds() -> list[dict]:
    """Training options that change how text becomes ids."""
    kinds = [
        {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "bos_id": -1},
        {"split_digits": True, "pad_id": -1},
    ]
    for kind, has_fallback, rule in product(("bpe", "char"), (True, False), ("nmt_nfkc", "identity")):
        own = ["<sep>"] if rule == "identity" else []
        normal = {"add_dummy_prefix": has_fallback, "normalization_rule_name": rule, "user_defined_symbols": own}
        kinds.append({"model_type": kind, "byte_fallback": has_fallback, **normal})
    return kinds


@pytest.mark.parametrize("options", sentencepiece_kinds())
def test_an_exported_sentencepiece_model_reads_every_text_alike(tmp_path, options):
    """What a model directory of the export gives `transformers` users: same ids, same special tokens, same text back."""
    ours = load_tokenizer(sentencepiece_file(tmp_path / "t.model", SENTENCES, vocab_size=400, **options))
    ours.save_for_export(tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    again = load_tokenizer(tmp_path / "export")
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text).input_ids == ours.encode_prompt(text) == again.encode_prompt(text), text
    for text in SENTENCES[:50]:
        assert theirs.decode(ours.encode_prompt(text), skip_special_tokens=True) == ours.decode(ours.encode_prompt(text)) == text
    for name in ("eos_id", "bos_id", "pad_id", "vocab_size"):
        assert getattr(again, name) == getattr(ours, name), name


def test_an_exported_unigram_model_reads_texts_alike_up_to_ties(tmp_path):
    ours = load_tokenizer(sentencepiece_file(tmp_path / "t.model", SENTENCES, vocab_size=300, model_type="unigram", byte_fallback=True))
    ours.save_for_export(tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    read = [(ours.encode(text), theirs(text, add_special_tokens=False).input_ids) for text in TEXTS]
    assert all(sorted(a) == sorted(b) for a, b in read)
    assert sum(a != b for a, b in read) <= 3


def test_an_export_that_would_read_differently_is_refused(tmp_path):
    for options, reason in (({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"), ({"model_type": "word"}, "word model")):
        tokenizer = load_tokenizer(sentencepiece_file(tmp_path / "t.model", SENTENCES, **options))
        with pytest.raises(DataError, match=reason):
            tokenizer.save_for_export(tmp_path / "export")
        assert not (tmp_path / "export").exists()


def test_a_hugging_face_directory_survives_export(tmp_path):
    ours = load_tokenizer(character_tokenizer_directory(tmp_path / "t", bos_token="<s>", pad_token="<pad>"))
    ours.save_for_export(tmp_path / "export")
    theirs = load_tokenizer(tmp_path / "export")
    assert theirs.encode("12+3=<|im_end|>") == ours.encode("12+3=<|im_end|>")
    assert theirs.render_chat(CHAT, True) == ours.render_chat(CHAT, True)
    assert (theirs.eos_id, theirs.pad_id, theirs.vocab_size) == (ours.eos_id, ours.pad_id, ours.vocab_size)
    assert ours.pad_id != ours.eos_id


def test_the_chat_template_is_honoured(tmp_path):
    tokenizer = load_tokenizer(character_tokenizer_directory(tmp_path / "t"))
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(CHAT[:1], add_generation_prompt=True) == tokenizer.encode(text)
    assert tokenizer.pad_id == tokenizer.eos_id, "no pad token of its own"
    assert tokenizer.bos_id is None


def test_without_a_chat_template_the_error_says_what_to_change(tmp_path):
    spm = load_tokenizer(sentencepiece_file(tmp_path / "t.model", SENTENCES))
    hf = load_tokenizer(character_tokenizer_directory(tmp_path / "t", template=None))
    for tokenizer in (spm, hf):
        with pytest.raises(DataError, match=r"no chat.template; set data.chat_template=false"):
            tokenizer.render_chat(CHAT, add_generation_prompt=False)
    template = "{{ raise_exception('roles must alternate') }}" + CHATML
    refusing = load_tokenizer(character_tokenizer_directory(tmp_path / "r", template=template))
    with pytest.raises(DataError, match="refuses this chat .*roles must alternate"):
        refusing.render_chat(CHAT, add_generation_prompt=False)


def test_a_response_is_decoded_up_to_end_of_text(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path / "t.model", SENTENCES))
    ids = tokenizer.encode("abc 12.")
    assert tokenizer.decode_response([*ids, tokenizer.eos_id, *ids]) == "abc 12."
    assert tokenizer.decode_response(ids) == "abc 12."
    assert tokenizer.decode_response([tokenizer.eos_id]) == ""


def test_a_response_ends_where_tokenizer_or_model_say(tmp_path):
    tokenizer = load_tokenizer(character_tokenizer_directory(tmp_path / "t"))
    start, letter = tokenizer.encode("<|im_start|>")[0], tokenizer.encode("a")[0]
    eos = tokenizer.eos_id
    assert stop_token_ids(tokenizer, ()) == stop_token_ids(tokenizer, (eos,)) == (eos,)
    assert stop_token_ids(tokenizer, (start, eos)) == (eos, start)
    assert stop_token_ids(tokenizer, (start,)) == (eos,), "a model that does not know the tokenizer's end speaks of another one"
    assert stop_token_ids(tokenizer, (eos, letter, 10**6)) == (eos,), "a token that stands for text ends nothing"
    assert tokenizer.decode_response([letter, start]) == "a"


def test_code_in_a_directory_is_refused(tmp_path):
    directory = character_tokenizer_directory(tmp_path / "t")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(DataError, match=r"tokenizer_config.json: auto_map asks to run code"):
        load_tokenizer(directory)


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"not a model")
    (tmp_path / "vocab.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tokenizer_config.json").write_text("{")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "tokenizer.json").write_text("{}")
    no_eos = sentencepiece_file(tmp_path / "no_eos.model", SENTENCES, eos_id=-1)
    for path, reason in [
        (tmp_path / "broken.model", "not a sentencepiece model"),
        (tmp_path / "vocab.txt", "expected a sentencepiece .model file"),
        (tmp_path / "nowhere", "not found"),
        (tmp_path / "empty", "the directory holds no tokenizer.json"),
        (tmp_path / "torn", "not readable as JSON"),
        (tmp_path / "hollow", "transformers cannot load it"),
        (no_eos, "no end-of-text token"),
    ]:
        with pytest.raises(DataError) as caught:
            load_tokenizer(path)
        assert reason in str(caught.value) and str(path) in str(caught.value), path
        assert len(str(caught.value).splitlines()) == 1


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_file(tmp_path / "t.model", SENTENCES))
    check_vocabulary(tokenizer, tokenizer.vocab_size, Path("m"), "actor.path")
    with pytest.raises(DataError, match=rf"has {tokenizer.vocab_size} tokens but actor.path=m has a vocabulary of 8"):
        check_vocabulary(tokenizer, 8, Path("m"), "actor.path")
