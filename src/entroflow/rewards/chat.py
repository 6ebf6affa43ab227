"""What is in a chat server's reply: an answer, or why there is none.

A reply is more than its content: a model may think before it answers, be cut off at its limit of
tokens, refuse, or call a tool; and a server may put an error where an answer belongs. Only a whole
answer is handed on, without the thoughts before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from entroflow.redaction import without_secrets
from entroflow.rewards.asking import Reply
from entroflow.rewards.base import Status

KEPT, EXAMPLE = 100_000, 200
"""Characters at the end of an answer that are kept; and of what came in place of one."""

_ENDED = {
    **dict.fromkeys(("length", "max_tokens", "model_length", "incomplete"), Status.CUT),
    **dict.fromkeys(("abort", "aborted", "cancelled", "canceled"), Status.CUT),
    **dict.fromkeys(("content_filter", "refusal", "safety", "recitation"), Status.REFUSED),
    **dict.fromkeys(("tool_calls", "function_call", "tool_use"), Status.TOOL_CALL),
    "error": Status.ERROR,
}
"""`finish_reason` -> what that makes of a reply; of all others, as `stop`, the content counts."""
_WHY = {
    Status.CUT: "was cut off",
    Status.REFUSED: "was held back",
    Status.TOOL_CALL: "calls a tool",
    Status.ERROR: "ended in an error",
}
_THOUGHTS = re.compile(r"</?(?:think|thinking|thought|reasoning)>|\[/?THINK\]|◁/?think▷")
"""Where thoughts begin and end, as chat templates mark them."""


class _NoAnswerError(Exception):
    """A reply without an answer: its status, why, and what it holds instead."""

    def __init__(self, status: Status, why: str, example: object) -> None:
        super().__init__(why)
        text = example if isinstance(example, str) else repr(example)
        self.reply = Reply(None, status, why, without_secrets(text)[-EXAMPLE:])


def read_reply(body: Any) -> Reply:
    """The answer in the body of a response, or a status and why there is none, with an example."""
    try:
        return Reply(without_secrets(_answer(_choice(body)))[-KEPT:], Status.OK)
    except _NoAnswerError as none:
        return none.reply


def _choice(body: Any) -> Any:
    """The first choice."""
    choices = _get(body, "choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if error := _get(body, "error") or _get(choice, "error"):
        raise _NoAnswerError(Status.ERROR, "is an error", _get(error, "message") or error)
    if not isinstance(choices, list):
        raise _NoAnswerError(Status.ERROR, "has no list `choices`", body)
    if choice is None:
        raise _NoAnswerError(Status.EMPTY, "has no choice in `choices`", "")
    return choice


def _answer(choice: Any) -> str:
    """The answer in a choice, without thoughts."""
    message = _get(choice, "message")
    content = _joined(_get(message, "content"))
    if not isinstance(message, Mapping) or content is None:
        raise _NoAnswerError(Status.ERROR, "has no message with text as its content", choice)
    if refusal := _get(message, "refusal") or _refusal(message):
        raise _NoAnswerError(Status.REFUSED, "is a refusal", refusal)
    thoughts = _get(message, "reasoning_content") or _get(message, "reasoning")
    shown = content or thoughts or ""
    ended = str(_get(choice, "finish_reason")).lower()
    if status := _ENDED.get(ended):
        raise _NoAnswerError(status, f"{_WHY[status]} (finish_reason {ended})", shown)
    answer, whole = _after_thoughts(content)
    if not whole:
        raise _NoAnswerError(Status.CUT, "was cut off within its thoughts", shown)
    if not answer.strip():
        if calls := _get(message, "tool_calls") or _get(message, "function_call"):
            raise _NoAnswerError(Status.TOOL_CALL, _WHY[Status.TOOL_CALL], calls)
        only = "holds thoughts only" if shown else "has no content"
        raise _NoAnswerError(Status.EMPTY, only, shown)
    return answer


def _get(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else None


def _joined(content: Any) -> str | None:
    """Content as text: parts that are text, one after the other; None where it is nothing known."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, str | Mapping) for part in parts):
        return None
    texts = [
        part if isinstance(part, str) else part.get("text")
        for part in parts
        if isinstance(part, str) or part.get("type", "text") in ("text", "output_text")
    ]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _refusal(message: Mapping[str, Any]) -> Any:
    """The part of the content that is a refusal, if there is one."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return next((part for part in parts if _get(part, "type") == "refusal"), None)


def _after_thoughts(text: str) -> tuple[str, bool]:
    """What follows the last thought, and whether the thoughts have an end."""
    marks = list(_THOUGHTS.finditer(text))
    ends = [mark.end() for mark in marks if "/" in mark[0]]
    whole = not marks or "/" in marks[-1][0]
    return text[ends[-1] if ends else 0 :], whole
