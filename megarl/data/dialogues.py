"""Pairs of whole dialogues, whose prompt is what they have in common: HH-RLHF's texts, TRL's pairs without a prompt."""

import re
from os.path import commonprefix
from typing import Any

from megarl.data.fields import LineFault, check_messages, required, text_field
from megarl.data.tokenizers import Message

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def is_hh(row: dict[str, Any]) -> bool:
    """Whether `chosen` is a dialogue of HH-RLHF."""
    chosen = row.get("chosen")
    return isinstance(chosen, str) and chosen.startswith(HUMAN) and ASSISTANT in chosen


def read_hh(row: dict[str, Any], purpose: str, has_chat: bool) -> dict[str, Any]:
    """A pair of dialogues as `prompt`, `chosen` and `rejected`; a demonstration imitates the chosen one.

    The prompt is their common turns up to the human turn before the first answers that differ. As text it ends with "\\n\\nAssistant:"
    and nothing is changed; as messages, turns lose the white space around them. Source: Bai et al. (2022), github.com/anthropics/hh-rlhf.
    """
    texts = {key: text_field(row, key) for key in ("chosen", "rejected")}
    turns = {key: _turns(text, key) for key, text in texts.items()}
    common = _num_common(*turns.values())
    if common == 0:
        raise LineFault("'chosen' and 'rejected' begin differently; expected a common prompt")
    if has_chat:
        messages = {key: [_message(turn) for turn in found] for key, found in turns.items()}
        parts: dict[str, Any] = {"prompt": messages["chosen"][:common]} | {key: found[common:] for key, found in messages.items()}
    else:
        start = sum(map(len, turns["chosen"][:common])) + len(ASSISTANT)
        parts = {"prompt": texts["chosen"][:start]} | {key: text[start:] for key, text in texts.items()}
    if purpose == "ranking":
        answers = [_answer(parts[key]) for key in ("chosen", "rejected")]
        return row | {"prompt": parts["prompt"], "responses": answers, "scores": [1.0, 0.0]}
    return row | parts | {"response": parts["chosen"]}


def split_pair(row: dict[str, Any]) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected` of a pair that holds its prompt in both: of messages the common turns, of texts the common start.

    Conversations with nothing in common are left as they are. The start of texts is cut before a space, as TRL cuts it.
    """
    chosen, rejected = (required(row, key) for key in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        common = _num_common(check_messages(chosen, "chosen"), check_messages(rejected, "rejected"))
        pair = {"chosen": chosen[common:], "rejected": rejected[common:]}
        return {"prompt": chosen[:common], **pair} if common else {}
    chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    start = len(commonprefix([chosen, rejected]))
    if chosen[:start].endswith(" "):
        start -= 1
    if start == 0:
        raise LineFault("missing key 'prompt', and 'chosen' and 'rejected' begin differently; expected a prompt in one of the two ways")
    if start in (len(chosen), len(rejected)):
        raise LineFault("one of 'chosen' and 'rejected' begins with the other, so their prompt cannot be told; expected a key 'prompt'")
    return {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}


def _num_common(one: list[Any], other: list[Any]) -> int:
    """How many leading turns are a prompt: equal, and with an assistant turn next in both."""
    most = min(len(one), len(other)) - 1
    equal = next((i for i in range(most) if one[i] != other[i]), most)
    while equal > 0 and not (_is_assistant(one[equal]) and _is_assistant(other[equal])):
        equal -= 1
    return max(equal, 0)


def _is_assistant(turn: Any) -> bool:
    return turn.startswith(ASSISTANT) if isinstance(turn, str) else turn["role"] == "assistant"


def _turns(dialogue: str, key: str) -> list[str]:
    """The turns of an HH-RLHF dialogue, each with its speaker in front."""
    starts = [found.start() for found in SPEAKER.finditer(dialogue)]
    if not starts or starts[0] != 0:
        raise LineFault(f"'{key}' does not begin with '\\n\\nHuman:'; expected a dialogue of HH-RLHF")
    turns = [dialogue[start:end] for start, end in zip(starts, [*starts[1:], len(dialogue)])]
    if not turns[-1].startswith(ASSISTANT) or not turns[-1][len(ASSISTANT) :].strip():
        raise LineFault(f"'{key}' does not end with an answer of the assistant")
    return turns


def _message(turn: str) -> Message:
    role, start = ("assistant", ASSISTANT) if turn.startswith(ASSISTANT) else ("user", HUMAN)
    return {"role": role, "content": turn[len(start) :].strip()}


def _answer(response: str | list[Message]) -> str:
    if isinstance(response, list) and len(response) != 1:
        raise LineFault("an answer of several turns cannot be ranked; expected dialogues that differ in their last answer")
    return response if isinstance(response, str) else response[0]["content"]
