import pytest

from megarl.data.fields import answer_field, messages_field, text_field
from megarl.data.reading import read_rows
from megarl.errors import DataError
from tests.unit.text_files import write_lines


def read_prompts(path):
    return read_rows(path, lambda place, row: (place.number, text_field(row, "prompt"))).rows


def test_rows_keep_their_line_numbers_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u00e9"}\r\n\n  \n{"prompt": "b"}'.encode())
    assert read_prompts(path) == [(1, "a\u00e9"), (4, "b")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "a list; expected a JSON object"),
        ("null", "null; expected a JSON object"),
        ('{"promt": "a"}', "missing key 'prompt'; did you mean 'promt'?"),
        ('{"x": 1}', "missing key 'prompt'; the line has 'x'"),
        ("{}", "the line has no keys"),
        ('{"prompt": 3}', "'prompt' is a number; expected text"),
        ('{"prompt": ["a"]}', "'prompt' is a list; expected text"),
        ('{"prompt": null}', "'prompt' is null; expected text"),
        ('{"prompt": ""}', "'prompt' is empty"),
        ('{"prompt": "a\\ud800"}', "surrogate pair at character 2"),
        ("[" * 100_000, "not JSON that can be read"),
    ],
)
def test_a_malformed_line_is_named_with_its_reason(tmp_path, line, reason):
    path = write_lines(tmp_path / "data.jsonl", ['{"prompt": "fine"}', line])
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"data.jsonl:2: not UTF-8 \(byte 13 of the line\)"):
        read_prompts(path)


def test_all_faults_are_counted_and_the_first_ten_listed(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", ["?"] * 13 + ['{"prompt": "a"}'])
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[9].startswith(f"{path}:10: ")
    assert lines[10] == f"{path}: and 3 more malformed lines (13 in all)"


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="no lines; expected one JSON object a line"):
        read_prompts(path)


def test_a_missing_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl: cannot be read \(No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path)


def test_answers_may_be_numbers_but_not_truth_values(tmp_path):
    def answers(row):
        return read_rows(write_lines(tmp_path / "d.jsonl", [row]), lambda place, row: answer_field(row, "answer")).rows

    assert answers({"answer": 12}) == ["12"]
    assert answers({"answer": "012"}) == ["012"]
    for wrong in (True, None, [1], " "):
        with pytest.raises(DataError, match="'answer'"):
            answers({"answer": wrong})


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "an empty list"),
        ("hello", "is text; expected a list of messages"),
        (["hello"], r"'messages'\[0\] is text"),
        ([{"role": "bot", "content": "x"}], "role 'bot'"),
        ([{"role": "user"}], "missing key 'content'"),
        ([{"role": "user", "content": None}], "'content' is null"),
    ],
)
def test_malformed_chats_are_refused(tmp_path, messages, reason):
    path = write_lines(tmp_path / "d.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=reason):
        read_rows(path, lambda place, row: messages_field(row, "messages"))
