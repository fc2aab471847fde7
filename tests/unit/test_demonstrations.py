import pytest

from megarl.config import LessonData
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import DataError, LayoutError
from megarl.parallel.layout import ParallelLayout
from tests.unit.text_files import REWRITING, character_tokenizer_directory, sentencepiece_letters, write_lines

ONE = ParallelLayout(1, 1, 1)
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(character_tokenizer_directory(tmp_path_factory.mktemp("t")))


def read(tmp_path, rows, tokenizer, **options):
    return DemonstrationSet(LessonData(path=write_lines(tmp_path / "d.jsonl", rows), **options), tokenizer)


def learned(row):
    return [token for token, is_learned in zip(row.token_ids, row.loss_mask, strict=True) if is_learned]


def test_the_response_and_its_end_are_learned(tmp_path, tokenizer):
    row = read(tmp_path, [{"prompt": "1+1=", "response": "2"}], tokenizer).demonstrations[0]
    assert list(row.token_ids) == [*tokenizer.encode("1+1=2"), tokenizer.eos_id]
    assert learned(row) == [*tokenizer.encode("2"), tokenizer.eos_id]


def test_a_plain_prompt_starts_as_the_rollout_starts_it(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_letters(tmp_path / "t.model"))
    row = read(tmp_path, [{"prompt": "ab", "response": "c"}], tokenizer).demonstrations[0]
    assert list(row.token_ids) == [tokenizer.bos_id, *tokenizer.encode("abc"), tokenizer.eos_id]


def test_every_assistant_turn_of_a_chat_is_learned_up_to_its_end_of_turn(tmp_path, tokenizer):
    row = read(tmp_path, [{"messages": TURNS}], tokenizer, chat_template=True).demonstrations[0]
    assert list(row.token_ids) == tokenizer.render_chat(TURNS, add_generation_prompt=False)
    assert learned(row) == tokenizer.encode("yo<|im_end|>4<|im_end|>")
    pair = read(tmp_path, [{"prompt": "hi", "response": "yo"}], tokenizer, chat_template=True).demonstrations[0]
    assert learned(pair) == tokenizer.encode("yo<|im_end|>")


def test_a_template_without_end_of_turn_still_teaches_the_last_turn_to_stop(tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = load_tokenizer(character_tokenizer_directory(tmp_path / "t", template=template))
    row = read(tmp_path, [{"messages": TURNS}], tokenizer, chat_template=True).demonstrations[0]
    assert learned(row) == [*tokenizer.encode("yo4"), tokenizer.eos_id]


def test_templates_that_rewrite_earlier_turns_are_refused(tmp_path):
    tokenizer = load_tokenizer(character_tokenizer_directory(tmp_path / "t", template=REWRITING))
    with pytest.raises(DataError, match=r"d.jsonl:1: the chat template renders message 2 differently"):
        read(tmp_path, [{"messages": TURNS}], tokenizer, chat_template=True)
    one_turn = read(tmp_path, [{"messages": TURNS[:3]}], tokenizer, chat_template=True).demonstrations[0]
    assert learned(one_turn) == tokenizer.encode("yo<|im_end|>")


@pytest.mark.parametrize(
    ("row", "chat", "reason"),
    [
        ({"prompt": "a"}, False, "missing key 'response'"),
        ({"prompt": "a", "response": ""}, False, "'response' is empty"),
        ({"messages": TURNS}, False, "set data.chat_template=true"),
        ({"messages": TURNS[:2]}, True, "no assistant turn"),
    ],
)
def test_lines_that_cannot_be_demonstrations_are_named(tmp_path, tokenizer, row, chat, reason):
    with pytest.raises(DataError, match=f"d.jsonl:1: .*{reason}"):
        read(tmp_path, [row], tokenizer, chat_template=chat)


def test_a_sentencepiece_tokenizer_with_chat_is_refused_at_the_line(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_letters(tmp_path / "t.model"))
    with pytest.raises(DataError, match="d.jsonl:1: .*no chat template"):
        read(tmp_path, [{"messages": TURNS}], tokenizer, chat_template=True)


def test_overlong_demonstrations_follow_the_policy(tmp_path, tokenizer):
    rows = [{"prompt": "ab", "response": "c"}, {"prompt": "ab", "response": "cdefgh"}, {"prompt": "abcdefgh", "response": "i"}]
    with pytest.raises(DataError, match=r"2 lines longer than data.max_tokens=5 tokens \(lines 2, 3\); .*skip or truncate"):
        read(tmp_path, rows, tokenizer, max_tokens=5)
    skipped = read(tmp_path, rows, tokenizer, max_tokens=5, overlong="skip")
    assert (len(skipped), skipped.num_skipped, skipped.num_truncated) == (1, 2, 0)
    cut = read(tmp_path, rows, tokenizer, max_tokens=5, overlong="truncate")
    assert (len(cut), cut.num_skipped, cut.num_truncated) == (2, 1, 1), "a cut that leaves no response is a skip"
    assert tokenizer.decode(learned(cut.demonstrations[1])) == "cde"
    with pytest.raises(DataError, match="no demonstration with a response fits"):
        read(tmp_path, rows, tokenizer, max_tokens=1, overlong="truncate")


def test_batches_are_the_same_global_list_under_every_layout(tmp_path, tokenizer):
    rows = read(tmp_path, [{"prompt": f"{i}=", "response": str(i)} for i in range(10)], tokenizer)
    whole = rows.for_step(3, 8, seed=2, layout=ONE)
    layout = ParallelLayout(2, 1, 8)
    parts = [rows.for_step(3, 8, seed=2, layout=layout.at(layout.rank_at(dp=dp))) for dp in range(4)]
    assert sum(parts, []) == whole
    assert whole != rows.for_step(4, 8, seed=2, layout=ONE) and whole != rows.for_step(3, 8, seed=3, layout=ONE)
    first_epoch = [row for step in range(5) for row in rows.for_step(step, 2, seed=2, layout=ONE)]
    assert sorted(row.token_ids for row in first_epoch) == sorted(row.token_ids for row in rows.demonstrations)
    shards = [rows.shard(layout.at(layout.rank_at(dp=dp))) for dp in range(4)]
    assert sum(shards, []) == rows.demonstrations
    with pytest.raises(LayoutError, match="train.batch_size is 6"):
        rows.for_step(0, 6, seed=0, layout=layout)


def test_the_evaluation_file_is_its_own(tmp_path, tokenizer):
    config = LessonData(
        path=write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}]),
        eval_path=write_lines(tmp_path / "b.jsonl", [{"prompt": "c", "response": "d"}] * 2),
    )
    assert len(DemonstrationSet(config, tokenizer)) == 1
    assert len(DemonstrationSet(config, tokenizer, is_eval=True)) == 2
