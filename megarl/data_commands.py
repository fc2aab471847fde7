"""Commands about datasets: `megarl data inspect`, `megarl data pairs`. Their arguments, and what they print."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megarl.config import DataSource, LessonData, PromptData
from megarl.errors import ConfigError, DataError
from megarl.file_commands import positive
from megarl.yaml_document import read_document

if TYPE_CHECKING:
    from megarl.data.survey import Sequences, Survey

PLAIN_WIDTH = 140  # columns of text that goes to a file
BAR = 50  # characters of the longest bar
KINDS = {"prompts": "prompt", "demonstrations": "demonstration", "preferences": "preference", "rankings": "ranking"}
SUMMARY = "look at files of prompts, demonstrations, pairs or ranked lists; make pairs of scored responses"


def add_data(command: argparse.ArgumentParser) -> None:
    """Arguments of `megarl data`."""
    actions = command.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    text = "counts, lengths, examples with what is learned marked, and every malformed row"
    inspect = actions.add_parser("inspect", help=text, description=text.capitalize() + ". Exit code 65 when rows are malformed.")
    inspect.set_defaults(action=run_inspect)
    inspect.add_argument("file", metavar="FILE", type=Path, nargs="?", help="file or directory of rows [those of --config]")
    inspect.add_argument(
        "--config", metavar="CONFIG", type=Path, help="YAML file of a run: read rows as its sections data and tokenizer say"
    )
    inspect.add_argument("--kind", choices=tuple(KINDS), help="what the rows are for [told by the first one]")
    inspect.add_argument("--tokenizer", metavar="PATH", type=Path, help="sentencepiece .model file or Hugging Face directory [characters]")
    inspect.add_argument("--chat-template", action="store_true", help="render prompts and messages through the tokenizer's template")
    inspect.add_argument("--learn", choices=("responses", "last_response", "all"), help="what is learned of demonstrations [responses]")
    inspect.add_argument("--max-tokens", type=positive, metavar="N", help="count the rows that are longer")
    inspect.add_argument("--examples", type=positive, default=3, metavar="N", help="rows to show [3]")
    text = "scored responses to the same prompt become pairs, ranked lists, or the best one of each prompt"
    pairs = actions.add_parser("pairs", help=text, description=text.capitalize() + ".")
    pairs.set_defaults(action=run_pairs)
    pairs.add_argument("file", metavar="FILE", type=Path, help="rows with responses and scores, or response and score (megarl sample)")
    pairs.add_argument("--out", metavar="OUT", type=Path, required=True, help="JSON lines to write; a new file")
    pairs.add_argument("--write", choices=("pairs", "rankings", "best"), default="pairs", help="what to make [pairs]")
    pairs.add_argument("--per-prompt", type=positive, default=1, metavar="N", help="pairs of a prompt at most, largest margins first [1]")
    pairs.add_argument(
        "--candidate",
        metavar="RESPONSE=SCORE",
        action="append",
        default=[],
        help="a column with a response and the one with its score (or a number), dotted where they lie in objects; may be repeated",
    )
    pairs.add_argument("--skip-malformed", action="store_true", help="leave malformed rows out instead of refusing the file")
    for action in (inspect, pairs):
        action.add_argument("--format", help="layout of the rows: plain, openrlhf, trl, alpaca, sharegpt, hh [told by each row]")
        action.add_argument(
            "--column", metavar="OURS=THEIRS", action="append", default=[], help="another name of a column: prompt=question"
        )
        action.add_argument("--split", metavar="NAME", help="of a dataset that has several")
        action.add_argument("--json", action="store_true", help="print JSON")


def run_inspect(parsed: argparse.Namespace) -> int:
    """`megarl data inspect`."""
    from megarl.data.survey import Characters, survey, use_of
    from megarl.data.tokenizers import load_tokenizer

    tree = read_document(parsed.config).tree if parsed.config is not None else {}
    if parsed.file is None and parsed.config is None:
        raise ConfigError("megarl data inspect: no file; expected FILE or --config CONFIG")
    path = parsed.tokenizer or (Path(str(tree["tokenizer"])).expanduser() if "tokenizer" in tree else None)
    tokenizer = Characters() if path is None else load_tokenizer(path)
    section = _section(parsed, tree, LessonData)
    use = KINDS[parsed.kind] if parsed.kind else "prompt" if "rollout" in tree else use_of(section.files())
    data = _section(parsed, tree, PromptData) if use == "prompt" else section
    found = survey(data, data.files(), use, tokenizer, parsed.examples)
    limit = data.max_prompt_tokens if isinstance(data, PromptData) else data.max_tokens
    if parsed.json:
        told = {"use": use, "files": [str(source.path) for source in data.files()], "tokenizer": str(tokenizer.path), "limit": limit}
        print(
            json.dumps(
                told | vars(found) | {"examples": [asdict(one) for one in found.examples], "histogram": found.histogram()},
                indent=1,
                ensure_ascii=False,
            )
        )
    else:
        _show(found, data.files(), "characters" if path is None else f"tokens of {path.name}", limit)
    if found.faults:
        raise DataError(f"{len(found.faults)} of {found.num_rows} rows are malformed")
    return 0


def run_pairs(parsed: argparse.Namespace) -> int:
    """`megarl data pairs`."""
    from megarl.data.pairing import Candidate, groups_of, write_groups

    candidates = []
    for text in parsed.candidate:
        response, equals, score = text.partition("=")
        if not response or not score:
            raise ConfigError(f"--candidate: found {text!r}; expected RESPONSE=SCORE, two columns, or a column and a number")
        candidates.append(Candidate(response, score))
    (source,) = _section(parsed, {}, LessonData).files()
    groups, faults = groups_of(source, candidates, "skip" if parsed.skip_malformed else "refuse")
    made = write_groups(groups, faults, parsed.out, parsed.write, parsed.per_prompt)
    if parsed.json:
        print(json.dumps(asdict(made), indent=1))
        return 0
    left = f"; {made.num_without} prompts left out, whose responses all have one score" if made.num_without else ""
    skipped = f"; {len(faults)} malformed rows skipped" if faults else ""
    print(f"{parsed.out}: {made.num_rows} {parsed.write} of {made.num_prompts} prompts{left}{skipped}")
    return 0


# ---------------------------------------------------------------- what is read, and how
def _section(parsed: argparse.Namespace, tree: dict[str, Any], kind: type[PromptData] | type[LessonData]) -> Any:
    """The data section that the configuration and the arguments describe."""
    values = {key: value for key, value in (tree.get("data") or {}).items() if key in kind.model_fields}
    if parsed.file is not None:
        values = {key: value for key, value in values.items() if key != "sources"} | {"path": str(parsed.file)}
    columns = dict(_renaming(text) for text in parsed.column)
    limit = "max_prompt_tokens" if kind is PromptData else "max_tokens"
    given = {
        "format": parsed.format,
        "split": parsed.split,
        "columns": {**values.get("columns", {}), **columns} or None,
        "chat_template": getattr(parsed, "chat_template", False) or None,
        limit: getattr(parsed, "max_tokens", None),
        "learn": getattr(parsed, "learn", None) if kind is LessonData else None,
    }
    values |= {key: value for key, value in given.items() if value is not None}
    try:
        return kind.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        faults = [f"data.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise ConfigError(faults) from error


def _renaming(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not ours or not theirs:
        raise ConfigError(f"--column: found {text!r}; expected OURS=THEIRS, such as prompt=question")
    return ours, theirs


# ---------------------------------------------------------------- printing
def _show(found: "Survey", files: Sequence[DataSource], unit: str, limit: int) -> None:
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    console.print(", ".join(source.path.name for source in files), style="bold", markup=False)
    good = len(found.lengths)
    layouts = ", ".join(f"{name} ({count})" if len(found.layouts) > 1 else name for name, count in found.layouts.most_common())
    facts = {
        "rows": f"{found.num_rows:,}: {good:,} {found.use}s, {len(found.faults):,} malformed",
        "layout": layouts or "none",
        "length": f"{sum(found.lengths):,} {unit} in the longest sequences of all rows",
        "longer than the limit": f"{found.overlong:,} rows of more than {limit:,}",
    }
    if found.num_filtered:
        facts["left out"] = f"{found.num_filtered:,} by their pass_rate"
    if found.num_learned:
        facts["learned"] = f"{found.num_learned:,} {unit.split()[0]}"
    for name, fact in facts.items():
        console.print(f"  {name:22} {fact}", markup=False)
    if found.lengths:
        _show_lengths(console, found, unit)
    if found.examples:
        has_marks = found.use != "prompt"
        how = "bold green" if console.is_terminal else "between ⟦ and ⟧"
        console.print(f"\nexamples{f', what is learned {how}' if has_marks else ''}", style="bold", markup=False)
    for example in found.examples:
        _show_example(console, example)
    if found.faults:
        console.print("\nmalformed rows", style="bold")
        for fault in found.faults:
            console.print(f"  {fault}", markup=False, soft_wrap=True)


def _show_lengths(console: Console, found: "Survey", unit: str) -> None:
    marks = ", ".join(f"{share:.0%} <= {found.quantile(share):,}" for share in (0.5, 0.9, 0.99, 1.0))
    console.print(f"\n{unit} of a row's longest sequence: {marks}", style="bold", markup=False)
    bins = found.histogram()
    most = max(count for _, _, count in bins)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for low, high, count in bins:
        table.add_row(f"  {low:,} to {high:,}", f"{count:,}", "█" * -(-BAR * count // most))
    console.print(table)


def _show_example(console: Console, example: "Sequences") -> None:
    for title, stretches in zip(example.titles, example.stretches, strict=True):
        console.print(f"\n  {example.place.rpartition('/')[2]} {title}", style="bold", markup=False)
        text = Text()
        for part, is_learned in stretches:
            marked = part if console.is_terminal or not is_learned else f"⟦{part}⟧"
            text.append(marked, style="bold green" if is_learned else "")
        console.print(text, soft_wrap=True)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int] | None]] = {
    "data": (SUMMARY, add_data, None),
}
