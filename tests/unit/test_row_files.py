"""Files of rows of every kind: what is read, where a row stands, and what is refused in one line."""

import gzip
import json
import shutil

import pytest

from megarl.config import LessonData
from megarl.data import row_files
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.row_files import scan
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import DataError
from tests.unit.text_files import character_tokenizer_directory, write_lines

pyarrow = pytest.importorskip("pyarrow")
ROWS = [{"prompt": f"p{i}", "messages": [{"role": "user", "content": f"c{i}"}], "n": i} for i in range(5)]


def rows_of(path, split=None):
    return [found.row for found in scan(path, split)]


def write_arrow(path, rows):
    """A stream, as `datasets` writes it."""
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=2)


def save_dataset(directory, rows, num_files=1):
    """The files of `datasets.Dataset.save_to_disk`."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{num_files:05d}.arrow" for i in range(num_files)]
    for i, name in enumerate(names):
        write_arrow(directory / name, rows[i::num_files])
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_format_columns": None, "_split": None}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")
    return directory


def write_parquet(path, rows):
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "list.txt").write_text("\ufeff \n" + json.dumps(ROWS))
    write_lines(tmp_path / "lines.jsonl", ROWS)
    write_lines(tmp_path / "lines.json", ROWS)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress((tmp_path / "lines.jsonl").read_bytes()))
    write_parquet(tmp_path / "table.parquet", ROWS)
    write_parquet(tmp_path / "table", ROWS)
    write_arrow(tmp_path / "stream.arrow", ROWS)
    save_dataset(tmp_path / "saved", ROWS)
    for name in "list.json list.txt lines.jsonl lines.json packed.jsonl.gz table.parquet table stream.arrow saved".split():
        assert rows_of(tmp_path / name) == ROWS, name


def test_places_are_lines_of_texts_and_rows_of_tables(tmp_path):
    (tmp_path / "list.json").write_text('[\n  {"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]\n')
    assert [str(found.place) for found in scan(tmp_path / "list.json")] == [f"{tmp_path}/list.json:{line}" for line in (2, 4, 5)]
    path = write_parquet(tmp_path / "t.parquet", ROWS)
    assert [str(found.place) for found in scan(path)] == [f"{path}: row {i}" for i in range(1, 6)]


def test_nulls_of_a_table_are_absent_keys(tmp_path):
    rows = [{"prompt": "a", "messages": None}, {"prompt": None, "messages": [{"role": "user", "content": "b", "name": None}]}]
    path = write_parquet(tmp_path / "t.parquet", rows)
    assert rows_of(path) == [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}]


def test_a_directory_is_its_files_in_order_and_a_split_chooses(tmp_path):
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ROWS[3:])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ROWS[:3])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", ROWS[:1])
    assert rows_of(tmp_path, "train") == ROWS
    assert rows_of(tmp_path) == ROWS[:1] + ROWS
    with pytest.raises(DataError, match="a directory without data files whose name starts with dev"):
        rows_of(tmp_path, "dev")
    write_lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match="files of several kinds"):
        rows_of(tmp_path)


def test_saved_datasets_with_splits_and_shards(tmp_path):
    save_dataset(tmp_path / "d" / "train", ROWS, num_files=2)
    save_dataset(tmp_path / "d" / "test", ROWS[:1])
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert rows_of(tmp_path / "d", "train") == ROWS[0::2] + ROWS[1::2]
    assert rows_of(tmp_path / "d" / "test") == ROWS[:1]
    with pytest.raises(DataError, match="with the splits train, test; choose one with split"):
        rows_of(tmp_path / "d")
    with pytest.raises(DataError, match="no split dev; expected one of train, test"):
        rows_of(tmp_path / "d", "dev")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("u.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), "u.jsonl: UTF-16 text; expected UTF-8"),
        ("t.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-20], "t.jsonl.gz: cannot be read"),
        ("t.parquet", b"not a table", "t.parquet: not a Parquet file"),
        ("p.parquet", b"PAR1 and nothing else", "p.parquet: not readable as parquet"),
        ("s.arrow", b"nothing of the kind", "s.arrow: not readable as arrow"),
        ("l.json", b'[{"a": 1}, {"b": ]', "l.json:1: not JSON: .*; the list is not read further"),
        ("l.json", b'[{"a": 1},\n {"b": 2}', "l.json:2: not JSON: expected ',' or ']'"),
        ("l.json", b'[{"a": 1},]', "l.json:1: not JSON"),
        ("l.json", b'[{"a": 1}] 3', "l.json:1: not JSON: something follows the list"),
        ("l.json", b'[{"a": 1}, 3]', "l.json:1: a number; expected a JSON object"),
        ("l.json", b"[]", "l.json: no lines"),
        ("l.json", b'[{"a": "\xff"}]', r"l.json: not UTF-8 \(byte 9\)"),
    ],
)
def test_what_is_no_file_of_rows_is_refused_in_one_line(tmp_path, name, content, reason):
    from megarl.data.reading import read_rows

    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_rows(tmp_path / name, lambda place, row: row)
    assert "\n" not in str(caught.value)


def test_a_saved_dataset_reads_nothing_outside_its_directory(tmp_path):
    saved = save_dataset(tmp_path / "saved", ROWS)
    shutil.copy(saved / "data-00000-of-00001.arrow", tmp_path / "outside.arrow")
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../outside.arrow"}]}')
    with pytest.raises(DataError, match="state.json: expected the names of the data files beside it"):
        rows_of(saved)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_files": [{"filename": "i"}]}')
    with pytest.raises(DataError, match="chosen by an index file"):
        rows_of(saved)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "t.parquet", ROWS)
    monkeypatch.setattr(row_files, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"t.parquet: parquet files need the package pyarrow; run pip install 'megarl\[data\]'"):
        rows_of(path)


def test_a_set_reads_a_table_and_names_its_rows(tmp_path):
    tokenizer = load_tokenizer(character_tokenizer_directory(tmp_path / "t"))
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": None}, {"prompt": "d", "response": "e"}]
    path = write_parquet(tmp_path / "t.parquet", rows)
    with pytest.raises(DataError, match="t.parquet: row 2: missing key 'response'"):
        DemonstrationSet(LessonData(path=path), tokenizer)
    assert len(DemonstrationSet(LessonData(path=path, malformed="skip"), tokenizer)) == 2
    with pytest.raises(DataError, match=r"t.parquet: 2 rows longer than data.max_tokens=2 tokens \(rows 1, 3\)"):
        DemonstrationSet(LessonData(path=path, max_tokens=2, malformed="skip"), tokenizer)
