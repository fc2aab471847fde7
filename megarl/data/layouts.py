"""The layouts that datasets come in, brought into one form: `prompt`, `response`, `chosen`, ... as docs/data.md lists them.

A prompt or a response is text, or a list of messages. Names of other projects are what they call their layouts; nothing of theirs is used.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from megarl.data.dialogues import is_hh, read_hh, split_pair
from megarl.data.fields import LineFault, check_messages, kind_of, required, text_field

Row = dict[str, Any]
Purpose = Literal["prompt", "demonstration", "preference", "ranking"]
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TOOL_ROLES = ("function_call", "observation", "function", "tool")


def canonical(row: Row, layout: str, columns: Mapping[str, str], purpose: Purpose, has_chat: bool) -> Row:
    """A row of any layout in one form. Raises `LineFault` where it does not fit its layout.

    Args: `layout` as in data.format; `columns` our names to the file's; `has_chat`: messages will be rendered, so turns are kept apart.
    """
    row = _renamed(row, columns)
    name = recognised(row) if layout == "auto" else layout
    if name == "hh":
        return read_hh(row, purpose, has_chat)
    return LAYOUTS[name](row, purpose)


def recognised(row: Row) -> str:
    """The layout that the keys of a row tell."""
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row and "prompt" not in row:
        return "alpaca"
    if "prompt" not in row and is_hh(row):
        return "hh"
    if "completion" in row or "chosen" in row and "prompt" not in row:
        return "trl"
    if "input" in row and not row.keys() & {"prompt", "messages"}:
        return "openrlhf"
    return "plain"


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with our names for the columns that have others; what is in the file under our name is hidden by them."""
    return row | {name: required(row, column) for name, column in columns.items()} if columns else row


def _plain(row: Row, purpose: Purpose) -> Row:
    if purpose in ("preference", "ranking") and all(_holds_prompt(row.get(key)) for key in ("chosen", "rejected")):
        row = row | split_pair(row)
    if purpose == "ranking" and "query" in row and "prompt" not in row:
        return row | {"prompt": row["query"]}
    if purpose == "ranking" and "responses" not in row and "chosen" in row:
        return _two_ranked(row)
    return row


def _holds_prompt(conversation: Any) -> bool:
    """Whether a list of messages begins with what it answers."""
    first = conversation[0] if isinstance(conversation, list) and len(conversation) > 1 else None
    return isinstance(first, dict) and first.get("role") in ("system", "user")


def _trl(row: Row, purpose: Purpose) -> Row:
    """TRL's dataset types: prompt-completion, messages, preference with or without a prompt of its own."""
    if "completion" in row:
        if isinstance(row.get("label"), bool):
            raise LineFault("'completion' with a 'label' of its own is an unpaired preference; make pairs of them: megarl data pairs")
        return row | {"response": row["completion"]}
    if "chosen" in row and "prompt" not in row:
        row = row | split_pair(row)
    return _plain(row, purpose)


def _openrlhf(row: Row, purpose: Purpose) -> Row:
    """`input`, `output` and `label`, OpenRLHF's default keys."""
    names = {"input": "prompt", "output": "response", "label": "answer"}
    return _plain(row | {ours: row[theirs] for theirs, ours in names.items() if theirs in row}, purpose)


def _alpaca(row: Row, purpose: Purpose) -> Row:
    """`instruction`, `input`, `output`, `history`, `system`; pairs in `chosen`, `rejected` or a list of two as `output`."""
    if "kto_tag" in row:
        raise LineFault("'kto_tag' marks an unpaired preference, which has no lesson here; expected pairs: chosen and rejected")
    question = "\n".join(part for key in ("instruction", "input") if (part := _optional_text(row, key)))
    if not question:
        raise LineFault("'instruction' is empty")
    system, history = _optional_text(row, "system"), row.get("history") or []
    prompt: Any = question
    if system or history:
        opening = [{"role": "system", "content": system}] if system else []
        prompt = [*opening, *_history(history), {"role": "user", "content": question}]
    output = row.get("output")
    if isinstance(output, list):
        if len(output) != 2:
            raise LineFault(f"'output' is a list of {len(output)}; expected text, or the chosen and the rejected response")
        return _plain(row | {"prompt": prompt, "chosen": output[0], "rejected": output[1]}, purpose)
    found = row | {"prompt": prompt} | ({"response": output} if "output" in row else {})
    if purpose == "demonstration" and history:  # earlier answers are learned too
        return {"messages": [*found["prompt"], {"role": "assistant", "content": text_field(row, "output")}]}
    return _plain(found, purpose)


def _history(history: Any) -> list[dict[str, str]]:
    turns = []
    for i, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise LineFault(f"'history'[{i}] is {kind_of(pair)}; expected a question and its answer")
        for role, text in zip(("user", "assistant"), pair):
            turns.append({"role": role, "content": text_field({f"history[{i}]": text}, f"history[{i}]", allow_empty=True)})
    return turns


def _sharegpt(row: Row, purpose: Purpose) -> Row:
    """`conversations` of `from` and `value`, `system`; pairs in `chosen` and `rejected`."""
    if row.get("tools"):
        raise LineFault("'tools' describes functions; conversations with tool calls are not supported, leave such rows out")
    turns = _turns(required(row, "conversations"), "conversations")
    if system := _optional_text(row, "system"):
        turns = [{"role": "system", "content": system}, *turns]
    if "chosen" in row and "rejected" in row:
        pair = {key: _turns([row[key]], key) if isinstance(row[key], dict) else row[key] for key in ("chosen", "rejected")}
        return _plain(row | {"prompt": turns} | pair, purpose)
    if purpose == "demonstration":
        return {"messages": turns}
    last = 1 if turns[-1]["role"] == "assistant" else 0  # a prompt is what the last answer answers
    return row | {"prompt": turns[: len(turns) - last]}


def _turns(conversation: Any, key: str) -> list[dict[str, str]]:
    if not isinstance(conversation, list) or not conversation:
        raise LineFault(f"'{key}' is {kind_of(conversation)}; expected a list of turns with from and value")
    turns = []
    for i, turn in enumerate(conversation):
        if not isinstance(turn, dict):
            raise LineFault(f"'{key}'[{i}] is {kind_of(turn)}; expected an object with from and value")
        speaker = text_field(turn, "from")
        if speaker in TOOL_ROLES:
            raise LineFault(f"'{key}'[{i}] is from '{speaker}'; conversations with tool calls are not supported, leave such rows out")
        if speaker not in SHAREGPT_ROLES:
            raise LineFault(f"'{key}'[{i}] is from '{speaker}'; expected {', '.join(SHAREGPT_ROLES)}")
        turns.append({"role": SHAREGPT_ROLES[speaker], "content": text_field(turn, "value", allow_empty=True)})
    return turns


def _two_ranked(row: Row) -> Row:
    """A pair as a list of two: texts alone, a list holds no conversations."""
    responses = []
    for key in ("chosen", "rejected"):
        turns = row.get(key)
        is_one_answer = isinstance(turns, list) and len(turns) == 1 and check_messages(turns, key)[0]["role"] == "assistant"
        responses.append(turns[0]["content"] if is_one_answer else text_field(row, key))
    return row | {"responses": responses, "scores": [1.0, 0.0]}


def _optional_text(row: Row, key: str) -> str:
    return text_field(row, key, allow_empty=True) if row.get(key) is not None else ""


LAYOUTS: dict[str, Callable[[Row, Purpose], Row]] = {
    "plain": _plain,
    "openrlhf": _openrlhf,
    "trl": _trl,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}
