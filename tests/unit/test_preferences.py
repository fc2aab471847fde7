import pytest

from megarl.config import LessonData
from megarl.data.preferences import PreferenceSet
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import DataError
from megarl.parallel.layout import ParallelLayout
from tests.unit.text_files import character_tokenizer_directory, write_lines

ONE = ParallelLayout(1, 1, 1)
GOOD = [{"role": "assistant", "content": "4"}]
BAD = [{"role": "assistant", "content": "5"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(character_tokenizer_directory(tmp_path_factory.mktemp("t")))


def read(tmp_path, rows, tokenizer, **options):
    return PreferenceSet(LessonData(path=write_lines(tmp_path / "p.jsonl", rows), **options), tokenizer)


def test_both_sides_share_the_prompt_and_end_with_end_of_text(tmp_path, tokenizer):
    pair = read(tmp_path, [{"prompt": "1+1=", "chosen": "2", "rejected": "30"}], tokenizer).preferences[0]
    assert list(pair.chosen_ids) == [*tokenizer.encode("1+1=2"), tokenizer.eos_id]
    assert list(pair.rejected_ids) == [*tokenizer.encode("1+1=30"), tokenizer.eos_id]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2", "chosen": "4", "rejected": "5"},
        {"prompt": [{"role": "user", "content": "2+2"}], "chosen": GOOD, "rejected": BAD},
        {"chosen": [{"role": "user", "content": "2+2"}, *GOOD], "rejected": [{"role": "user", "content": "2+2"}, *BAD]},
    ],
)
def test_chats_end_at_the_last_end_of_turn_where_the_score_is_read(tmp_path, tokenizer, row):
    pair = read(tmp_path, [row], tokenizer, chat_template=True).preferences[0]
    before = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    assert list(pair.chosen_ids) == tokenizer.encode(before + "4<|im_end|>")
    assert list(pair.rejected_ids) == tokenizer.encode(before + "5<|im_end|>")


@pytest.mark.parametrize(
    ("row", "chat", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, False, "missing key 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, False, "the same tokens"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, False, "'rejected' is a number"),
        ({"prompt": "a", "chosen": GOOD, "rejected": BAD}, False, "set data.chat_template=true"),
        ({"chosen": GOOD, "rejected": BAD}, True, "'chosen' must end a conversation"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": BAD}, True, "'chosen' must end a conversation"),
        ({"prompt": "a", "chosen": 4, "rejected": BAD}, True, "'chosen' is a number"),
    ],
)
def test_lines_that_cannot_be_pairs_are_named(tmp_path, tokenizer, row, chat, reason):
    with pytest.raises(DataError, match=f"p.jsonl:1: .*{reason}"):
        read(tmp_path, [row], tokenizer, chat_template=chat)


def test_overlong_pairs_follow_the_policy(tmp_path, tokenizer):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "bbbbb", "rejected": "c"},
        {"prompt": "a", "chosen": "bbbbb", "rejected": "bbbbc"},
    ]
    with pytest.raises(DataError, match=r"2 lines longer than data.max_tokens=4 tokens \(lines 2, 3\)"):
        read(tmp_path, rows, tokenizer, max_tokens=4)
    skipped = read(tmp_path, rows, tokenizer, max_tokens=4, overlong="skip")
    assert (len(skipped), skipped.num_skipped) == (1, 2)
    cut = read(tmp_path, rows, tokenizer, max_tokens=4, overlong="truncate")
    assert (len(cut), cut.num_truncated, cut.num_skipped) == (2, 1, 1), "a cut that makes both sides equal is a skip"
    assert tokenizer.decode(cut.preferences[1].chosen_ids) == "abbb"


def test_batches_are_the_same_global_list_under_every_layout(tmp_path, tokenizer):
    pairs = read(tmp_path, [{"prompt": f"{i}=", "chosen": "1", "rejected": "2"} for i in range(9)], tokenizer)
    whole = pairs.for_step(2, 6, seed=0, layout=ONE)
    layout = ParallelLayout(1, 2, 4)
    parts = [pairs.for_step(2, 6, seed=0, layout=layout.at(layout.rank_at(dp=dp))) for dp in range(2)]
    assert sum(parts, []) == whole
    assert sum([pairs.shard(layout.at(layout.rank_at(dp=dp))) for dp in range(2)], []) == pairs.preferences
