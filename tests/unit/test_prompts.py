import pytest

from megarl.config import PromptData
from megarl.data.order import Purpose, epoch_order, rows_at
from megarl.data.prompts import PromptSet
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import DataError, LayoutError
from megarl.parallel.layout import ParallelLayout
from tests.unit.text_files import character_tokenizer_directory, sentencepiece_letters, write_lines

ONE = ParallelLayout(1, 1, 1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(character_tokenizer_directory(tmp_path_factory.mktemp("t")))


@pytest.fixture
def ten(tmp_path, tokenizer):
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10)])
    return PromptSet(PromptData(path=path), tokenizer)


def ids(prompts):
    return [prompt.prompt_id for prompt in prompts]


def for_step(prompts, step, size, seed, layout):
    """What a run of `size` prompts a step reads in step `step`."""
    return prompts.from_position(step * size, size, seed, layout)


def test_prompts_carry_tokens_answer_and_file_position(ten, tokenizer):
    prompt = ten.prompts[3]
    assert (prompt.prompt_id, prompt.text, prompt.answer) == (3, "3+3=", "6")
    assert tokenizer.decode(prompt.token_ids) == "3+3="


def test_every_epoch_is_another_permutation_of_the_file(ten):
    epochs = [ids(for_step(ten, step, 10, seed=4, layout=ONE)) for step in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(10))
    assert epochs[0] != ids(for_step(ten, 0, 10, seed=5, layout=ONE))


def test_the_order_never_changes_between_versions():
    # Fixed numbers: a run resumed under another numpy must see the same prompts.
    assert epoch_order(6, 0, 0, Purpose.PROMPTS).tolist() == ORDER_OF_SIX
    assert epoch_order(6, 0, 0, Purpose.DEMONSTRATIONS).tolist() != ORDER_OF_SIX


def test_steps_of_any_size_cut_the_same_stream(ten):
    stream = ids(for_step(ten, 0, 40, seed=0, layout=ONE))
    for size in (1, 4, 7):
        cut = [i for step in range(40 // size + 1) for i in ids(for_step(ten, step, size, seed=0, layout=ONE))]
        assert cut[:40] == stream
    assert ids(ten.from_position(17, 6, seed=0, layout=ONE)) == stream[17:23]
    assert rows_at(17, 6, 10, 0, Purpose.PROMPTS) == stream[17:23]


@pytest.mark.parametrize("tensor, pipeline, world", [(1, 1, 4), (2, 2, 8), (2, 1, 8), (1, 2, 4)])
def test_data_ranks_hold_contiguous_parts_of_one_global_list(ten, tensor, pipeline, world):
    whole = ids(for_step(ten, 5, 12, seed=1, layout=ONE))
    layout = ParallelLayout(tensor, pipeline, world)
    parts = {}
    for rank in range(world):
        mine = ids(for_step(ten, 5, 12, seed=1, layout=layout.at(rank)))
        assert parts.setdefault(layout.at(rank).dp_rank, mine) == mine, "all ranks of a replica see the same prompts"
    assert [i for dp in range(layout.data) for i in parts[dp]] == whole


def test_evaluation_reads_the_head_of_the_file_once(ten):
    layout = ParallelLayout(1, 1, 4)
    parts = [ids(ten.first(7, layout.at(rank))) for rank in range(4)]
    assert sum(parts, []) == list(range(7))
    assert ids(ten.first(100, ONE)) == list(range(10))


def test_a_step_that_does_not_divide_over_the_replicas_is_refused(ten):
    with pytest.raises(LayoutError, match="rollout.prompts_per_step is 7; expected a multiple of the 4"):
        for_step(ten, 0, 7, seed=0, layout=ParallelLayout(1, 1, 4))


def test_overlong_prompts_follow_the_policy(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "abc"}, {"prompt": "0123456789"}, {"prompt": "de"}])

    def read(policy):
        return PromptSet(PromptData(path=path, max_prompt_tokens=4, overlong=policy), tokenizer)

    with pytest.raises(DataError, match=r"1 lines longer than data.max_prompt_tokens=4 tokens \(lines 2\); .*skip or truncate_left"):
        read("refuse")
    skipped = read("skip")
    assert [p.text for p in skipped.prompts] == ["abc", "de"] and ids(skipped.prompts) == [0, 1]
    assert (skipped.num_skipped, skipped.num_truncated) == (1, 0)
    cut = read("truncate_left")
    assert tokenizer.decode(cut.prompts[1].token_ids) == "6789"
    assert (cut.num_skipped, cut.num_truncated) == (0, 1)
    with pytest.raises(DataError, match="no prompt fits data.max_prompt_tokens=1; raise it"):
        PromptSet(PromptData(path=path, max_prompt_tokens=1, overlong="skip"), tokenizer)


def test_truncation_keeps_the_begin_of_text_token(tmp_path):
    tokenizer = load_tokenizer(sentencepiece_letters(tmp_path / "t.model"))
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "abcdefgh"}])
    prompts = PromptSet(PromptData(path=path, max_prompt_tokens=4, overlong="truncate_left"), tokenizer).prompts
    assert prompts[0].token_ids == (tokenizer.bos_id, *tokenizer.encode("fgh"))


def test_chats_are_rendered_up_to_the_generation_prompt(tmp_path, tokenizer):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "yo"}]
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "hi"}, {"messages": chat}])
    prompts = PromptSet(PromptData(path=path, chat_template=True), tokenizer).prompts
    assert list(prompts[0].token_ids) == tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert list(prompts[1].token_ids) == tokenizer.encode(
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nyo<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("row", "chat", "needs_answers", "reason"),
    [
        ({"prompt": "a"}, False, True, "missing key 'answer'"),
        ({"prompt": "a", "anwser": "b"}, False, True, "did you mean 'anwser'"),
        ({"messages": [{"role": "user", "content": "a"}]}, False, False, "set data.chat_template=true"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, True, False, "ends with the assistant"),
        ({"prompt": "a", "answer": [1]}, False, False, "'answer' is a list"),
    ],
)
def test_lines_that_cannot_be_prompts_are_named(tmp_path, tokenizer, row, chat, needs_answers, reason):
    path = write_lines(tmp_path / "p.jsonl", [row])
    with pytest.raises(DataError, match=f"p.jsonl:1: .*{reason}"):
        PromptSet(PromptData(path=path, chat_template=chat), tokenizer, needs_answers)


def test_prompt_and_answer_may_have_other_names(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", [{"question": "1+1=", "solution": 2, "answer": "no"}])
    data = PromptData(path=path, columns={"prompt": "question", "answer": "solution"})
    (prompt,) = PromptSet(data, tokenizer, needs_answers=True).prompts
    assert (prompt.text, prompt.answer) == ("1+1=", "2")


ORDER_OF_SIX = [4, 5, 3, 1, 0, 2]
