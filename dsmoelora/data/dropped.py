"""Keys of a conversation that its chat template does not write: what they say would be missing from what is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsmoelora.data.formats import Conversation
from dsmoelora.data.keys import THOUGHTS
from dsmoelora.data.problems import RowProblem
from dsmoelora.data.turns import Message

Render = Callable[[list[Message], list[dict[str, Any]] | None], str]


def check_nothing_dropped(conversation: Conversation, render: Render) -> None:
    """Refuse a conversation with tools, calls or thoughts that leave no trace in what its template renders.

    Thoughts are looked for in what ends with their turn, for templates leave out those of earlier turns; of turns that
    are not learned they may be left out. The same thoughts under two keys may be written once. Ids and names need not
    be written. What came before the last question is left out here, so that the work grows with the turns.

    Args:
        conversation: of one row
        render: messages and tools to text

    Raises:
        RowProblem: there are such
    """
    messages, tools = conversation.messages, conversation.tools
    if tools and render(messages, tools) == render(messages, None):
        raise _dropped("tools", "")
    for i, message in enumerate(messages):
        is_learned = conversation.learned is None or i in conversation.learned
        thoughts = [key for key in THOUGHTS if key in message] if is_learned else []
        for keys in (thoughts, ["tool_calls"] if "tool_calls" in message else []):
            if not keys:
                continue
            first = max((k for k in range(i) if messages[k]["role"] == "user"), default=0)
            without = {key: value for key, value in message.items() if key not in keys}
            if render(messages[first : i + 1], tools) == render([*messages[first:i], without], tools):
                raise _dropped(" and ".join(keys), f" of messages[{i}]")


def _dropped(what: str, where: str) -> RowProblem:
    return RowProblem(
        f"the model's chat template leaves out {what}{where}, so that the model would not see what the row says. Take "
        "a model whose template writes them, or take them out of the row."
    )
