"""A conversation as the text that a model was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from transformers import AutoTokenizer


def render_chat(folder: str | os.PathLike[str], messages: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation as text, up to where the model's answer begins.

    Args:
        folder: Of a model, with a tokenizer that has a chat template; the template runs in a sandbox.
        messages: What was said: mappings with "role" ("system", "user", "assistant") and "content".

    Raises:
        ValueError: If there is no tokenizer, or no template, or it does not take these messages.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
    except Exception as error:  # of whatever kind the tokenizer's own code raises
        raise ValueError(f"{folder}: no tokenizer that transformers reads ({error})") from error
    if not tokenizer.chat_template:
        raise ValueError(
            f"{folder}: its tokenizer has no chat template. Put the chat_template.jinja of the model into the folder, "
            f"or prompt it with plain text."
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # jinja's own, and what a template raises
        raise ValueError(f"{folder}: the chat template does not take these messages ({error})") from error
    return str(text)
