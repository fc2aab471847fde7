"""Several sources as one stream: shares by weight, epochs of each source, and a position is all that is needed to go on."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config import DataSource, LessonData, PromptData
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.order import BLOCK, Mixture, Purpose, block_shares
from megarl.data.prompts import PromptSet
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import DataError
from megarl.parallel.layout import ParallelLayout
from tests.unit.text_files import character_tokenizer_directory, write_lines

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(character_tokenizer_directory(tmp_path_factory.mktemp("t")))


def source_of(row, sizes):
    return next(i for i in range(len(sizes)) if row < sum(sizes[: i + 1]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_row_of_a_source_comes_once_an_epoch_wherever_one_starts_reading(data):
    sizes = data.draw(SIZES)
    weights = tuple(data.draw(st.floats(0.1, 10)) for _ in sizes)
    seed, start, count = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 3 * BLOCK)), data.draw(st.integers(1, 60))
    mixture = Mixture(sizes, weights)
    stream = mixture.rows_at(0, start + count, seed, Purpose.PROMPTS)
    assert mixture.rows_at(start, count, seed, Purpose.PROMPTS) == stream[start:]
    for i, size in enumerate(sizes):
        mine = [row for row in stream if source_of(row, sizes) == i]
        for epoch in range(len(mine) // size):
            assert len(set(mine[epoch * size : (epoch + 1) * size])) == size


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(0, 5), st.integers(0, 40), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_any_world_reads_the_same_stream(sizes, seed, step, world, is_weighted):
    mixture = Mixture(sizes, (1.0,) * len(sizes) if is_weighted else None)
    whole = mixture.rows_at(step * 8, 8, seed, Purpose.PROMPTS)
    share = 8 // world
    parts = [mixture.rows_at(step * 8 + rank * share, share, seed, Purpose.PROMPTS) for rank in range(world)]
    assert sum(parts, []) == whole


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=20))
def test_shares_fill_a_block_and_follow_the_weights(weights):
    shares = block_shares(weights)
    assert sum(shares) == BLOCK and min(shares) >= 1
    for share, weight in zip(shares, weights):
        assert abs(share - BLOCK * weight / sum(weights)) <= len(weights) + 1


def test_a_block_holds_exactly_the_shares_and_no_weights_mean_one_dataset():
    sizes = (3, 100)
    counts = Counter(source_of(row, sizes) for row in Mixture(sizes, (3.0, 1.0)).rows_at(5 * BLOCK, BLOCK, 0, Purpose.PROMPTS))
    assert counts[0] in (749, 750) and counts[0] + counts[1] == BLOCK
    together = Mixture(sizes).rows_at(0, 103, 0, Purpose.PROMPTS)
    assert sorted(together) == list(range(103))
    assert together == Mixture((103,), (2.0,)).rows_at(0, 103, 0, Purpose.PROMPTS), "one source is read as it always was"


def test_a_run_reads_sources_with_options_of_their_own(tmp_path, tokenizer):
    plain = write_lines(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "answer": "1"} for i in range(4)])
    other = write_lines(tmp_path / "b.jsonl", [{"question": f"b{i}", "solution": "2"} for i in range(6)])
    columns = {"prompt": "question", "answer": "solution"}
    sources = (DataSource(path=plain, weight=1), DataSource(path=other, weight=3, columns=columns, template="Q: {}"))
    prompts = PromptSet(PromptData(sources=sources), tokenizer, needs_answers=True)
    assert [(p.text, p.answer) for p in prompts.prompts] == [*((f"a{i}", "1") for i in range(4)), *((f"b{i}", "2") for i in range(6))]
    assert [p.prompt_id for p in prompts.prompts] == list(range(10))
    assert tokenizer.decode(prompts.prompts[4].token_ids) == "Q: b0"
    layout = ParallelLayout(1, 1, 2)
    whole = prompts.from_position(10, 400, 0, ParallelLayout(1, 1, 1))
    assert sum([prompts.from_position(10, 400, 0, layout.at(rank)) for rank in range(2)], []) == whole
    assert 250 < sum(p.text.startswith("b") for p in whole) < 350


def test_a_source_without_usable_rows_is_named(tmp_path, tokenizer):
    good = write_lines(tmp_path / "good.jsonl", [{"prompt": "a", "response": "b"}])
    long = write_lines(tmp_path / "long.jsonl", [{"prompt": "aaaaaaaa", "response": "b"}])
    sources = (DataSource(path=good), DataSource(path=long))
    with pytest.raises(DataError, match="long.jsonl: no demonstration with a response fits data.max_tokens=5; raise it"):
        DemonstrationSet(LessonData(sources=sources, max_tokens=5, overlong="skip"), tokenizer)


def test_prompts_are_kept_by_their_pass_rate(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"p{i}", "pass_rate": i / 4} for i in range(5)])
    prompts = PromptSet(PromptData(path=path, min_pass_rate=0.25, max_pass_rate=0.75), tokenizer)
    assert [p.text for p in prompts.prompts] == ["p1", "p2", "p3"]
    assert [p.prompt_id for p in prompts.prompts] == [0, 1, 2] and prompts.num_filtered == 2
    assert prompts.notices() == [f"{path}: 2 rows left out by their pass_rate"]
    held_out = PromptData(path=path, min_pass_rate=0.25, max_pass_rate=0.75).for_file(path)
    assert len(PromptSet(held_out, tokenizer)) == 5, "a held-out set is read whole"
    with pytest.raises(DataError, match="p.jsonl: no prompt fits .* data.min_pass_rate"):
        PromptSet(PromptData(path=path, min_pass_rate=0.3, max_pass_rate=0.4), tokenizer)
    write_lines(path, [{"prompt": "a"}])
    with pytest.raises(DataError, match="p.jsonl:1: missing key 'pass_rate'"):
        PromptSet(PromptData(path=path, min_pass_rate=0.1), tokenizer)


def test_malformed_rows_may_be_skipped_and_are_counted(tmp_path, tokenizer):
    path = write_lines(tmp_path / "p.jsonl", ["{", {"prompt": "a"}, {"prompt": 3}, {"prompt": "b"}])
    prompts = PromptSet(PromptData(path=path, malformed="skip"), tokenizer)
    assert [p.text for p in prompts.prompts] == ["a", "b"] and prompts.num_malformed == 2
    assert prompts.notices() == [f"{path}: 2 malformed rows skipped"]
    write_lines(path, ["{", "}"])
    with pytest.raises(DataError, match="p.jsonl:1: not JSON"):
        PromptSet(PromptData(path=path, malformed="skip"), tokenizer)
