"""A sentencepiece model as a Hugging Face `tokenizer.json` that gives the same ids, checked on probe texts before it is kept.

Sentencepiece normalises (character map, extra whitespace, dummy prefix, space to U+2581), then segments by merging pairs of best
score (BPE) or by the most probable path (unigram); Kudo and Richardson 2018. The `tokenizers` library can say each of these.
"""

import json
import re
import shutil
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megarl.errors import DataError

SPACE = "\u2581"
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4  # TrainerSpec.ModelType
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # SentencePiece.Type
NUM_PROBES = 2000
FIXED_PROBES = (
    *("", " ", "a", " a", "a ", "  two  spaces  ", "tab\tnew \n line\n", "12 + 34=046", "The fox, it's 3.14!"),
    *("caf\u00e9 cafe\u0301 \ufb01 \u2460", "\u4f60\u597d \u4e16\u754c", "\U0001f600 \U0001f468\u200d\U0001f469", "\u2581 \u00a0x\u3000y"),
)


def write_fast_tokenizer(model_file: Path, directory: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and a copy of the model as `tokenizer.model` into `directory`.

    Raises `DataError` when the model uses something the `tokenizers` library cannot express, found by comparing ids on probe texts.
    Outside the promise: texts that spell a control token such as `</s>` (sentencepiece reads them as characters), and Windows line ends
    under a character map without remove_extra_whitespaces (`tokenizers` maps their two characters as one).
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    fast = fast_tokenizer(proto, model_file)
    check_same_ids(proto, fast, model_file)
    directory.mkdir(parents=True, exist_ok=True)
    fast.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **_special_tokens(proto)}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if model_file.resolve() != (directory / "tokenizer.model").resolve():
        shutil.copyfile(model_file, directory / "tokenizer.model")


def fast_tokenizer(proto: "sentencepiece_model_pb2.ModelProto", model_file: Path) -> Tokenizer:
    """The sentencepiece model `proto` as a `tokenizers.Tokenizer`; `model_file` is named in errors."""
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.treat_whitespace_as_suffix:
        raise DataError(f"tokenizer {model_file}: treat_whitespace_as_suffix has no Hugging Face form; train it without")
    user_defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    fast = Tokenizer(_model(proto, bool(user_defined), model_file))
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    fast.normalizer = normalizers.Sequence(steps)
    if user_defined:
        alternatives = "|".join(re.escape(symbol) for symbol in sorted(user_defined, key=len, reverse=True))
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(alternatives), behavior="isolated")
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    fast.add_special_tokens([AddedToken(p.piece, normalized=False, special=True) for p in proto.pieces if p.type == CONTROL])
    if trainer.bos_id >= 0:
        bos = proto.pieces[trainer.bos_id].piece
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, trainer.bos_id)]
        )
    return fast


def check_same_ids(proto: "sentencepiece_model_pb2.ModelProto", fast: Tokenizer, model_file: Path) -> None:
    """Raise `DataError` with the first probe text that `fast` reads differently from sentencepiece.

    A unigram model may know several equally probable paths of the same pieces; float rounding picks one, so their order is not compared.
    """
    form = sorted if proto.trainer_spec.model_type == UNIGRAM else list
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    for text in probe_texts(proto):
        expected, found = processor.encode(text), fast.encode(text, add_special_tokens=False).ids
        if form(expected) != form(found):
            raise DataError(
                f"tokenizer {model_file}: its Hugging Face form reads {text!r} as {found} instead of {expected};"
                " this kind of sentencepiece model cannot be exported, use a Hugging Face tokenizer directory"
            )


def probe_texts(proto: "sentencepiece_model_pb2.ModelProto") -> list[str]:
    """Texts that touch what tokenizers disagree about: every stretch of the vocabulary, spaces, accents, emoji, unknown characters."""
    pieces = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type in (NORMAL, USER_DEFINED)]
    stride = max(1, len(pieces) // NUM_PROBES)
    single = pieces[::stride][:NUM_PROBES]
    # Neighbours a fixed distance apart make texts whose segmentation is not their construction.
    joined = ["".join(pieces[(i * 7919 + j * 104729) % len(pieces)] for j in range(5)) for i in range(min(NUM_PROBES, len(pieces)))]
    return [*FIXED_PROBES, *single, *joined]


def _model(proto: "sentencepiece_model_pb2.ModelProto", has_user_defined: bool, model_file: Path) -> models.Model:
    kind, unk = proto.trainer_spec.model_type, proto.trainer_spec.unk_id
    byte_fallback = proto.trainer_spec.byte_fallback
    if kind == UNIGRAM:
        return models.Unigram([(p.piece, p.score) for p in proto.pieces], unk_id=unk, byte_fallback=byte_fallback)
    if kind not in (BPE, CHAR):
        raise DataError(f"tokenizer {model_file}: a word model has no Hugging Face form; train model_type unigram, bpe or char")
    return models.BPE(
        vocab={p.piece: i for i, p in enumerate(proto.pieces)},
        merges=_merges(proto) if kind == BPE else [],
        unk_token=proto.pieces[unk].piece,
        fuse_unk=True,
        byte_fallback=byte_fallback,
        ignore_merges=has_user_defined,
    )


def _merges(proto: "sentencepiece_model_pb2.ModelProto") -> list[tuple[str, str]]:
    """Pairs of pieces that join to a piece, best score first, as sentencepiece would join them."""
    ids = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == NORMAL}
    ranked = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-proto.pieces[i].score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _special_tokens(proto: "sentencepiece_model_pb2.ModelProto") -> dict[str, str]:
    trainer = proto.trainer_spec
    ids = {"unk_token": trainer.unk_id, "bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    if ids["pad_token"] < 0:
        ids["pad_token"] = ids["eos_token"]
    return {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}
