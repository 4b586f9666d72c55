"""A chat as plain text, for models that know no chats.

Each question stands with its answer in a block of its own, an empty line between blocks, and what
the model is to write follows the last question. So an empty line ends an answer, unless the user
says what does.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_compress.operations.teaching.seeds import Message

BETWEEN = "\n\n"


def as_text(messages: Sequence[Message]) -> str:
    """The messages in order; an answer follows its question behind a space."""
    blocks: list[str] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and blocks:
            apart = blocks[-1][-1:].isspace() or content[:1].isspace()
            blocks[-1] += content if apart else f" {content}"
        else:
            blocks.append(content)
    return BETWEEN.join(blocks)
