"""Chats as the text that a server would make of them.

The tokenizer's own chat template renders messages and tools, without a generation prompt. A BOS
that the template writes is left out where the tokenizer puts one before every text: each sequence
then has one already. Chats of a tokenizer without a template can be joined as plain text.
"""

from __future__ import annotations

from typing import Any

from compress_methods.calibration.rows import Chat
from compress_methods.calibration.tokenizer import leading_bos
from compress_methods.errors import CalibrationError


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(chat: Chat, where: str, tokenizer: Any, prompt: bool = False) -> str:
    """A chat through the template; `prompt` ends it where the assistant's answer begins.

    Raises `CalibrationError` where there is no template, or it refuses the chat.
    """
    if not has_template(tokenizer):
        raise CalibrationError(
            f"{where}: has messages, but the tokenizer has no chat template; use text instead"
        )
    try:
        text = str(
            tokenizer.apply_chat_template(
                chat.messages,
                tools=chat.tools or None,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )
    except Exception as problem:  # templates raise errors of their own for chats they refuse
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise CalibrationError(
            f"{where}: the chat template refuses these messages ({reason})"
        ) from problem
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and leading_bos(tokenizer) is not None:
        return text.removeprefix(bos)
    return text


def join(chat: Chat) -> str:
    """What is said in a chat, as one text without roles."""
    said = [message["content"] for message in chat.messages]
    return "\n\n".join(text for text in said if text.strip())
