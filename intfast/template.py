"""The model's own chat template: rendered, and checked at both ends before anything is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from intfast import verdict
from intfast.config import PromptConfig

Turns = Sequence[tuple[str, str]]
"""(role, text) of a conversation."""
_ROLE = re.compile("assistant|model|bot", re.IGNORECASE)
ASKED = ("first question", "the reply", "second question")


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's first, then what its model folder names.

    Raises ValueError where there is none.
    """
    ids = [tokenizer.eos_token_id, *getattr(tokenizer, "end_ids", tuple)()]
    if not (found := tuple(dict.fromkeys(i for i in ids if i is not None))):
        raise ValueError(
            "the tokenizer names no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    return found


class Template:
    """The chat template of a tokenizer, with the system turn and the arguments of the config.

    Raises ValueError for a template that loses a turn, does not open the assistant's, or ends it
    with a token that stops nothing.
    """

    stop_ids: tuple[int, ...]
    """What ends an answer; the first is what the template itself ends a turn with."""
    lead: str
    """White space between the prompt and what the assistant says."""

    def __init__(self, config: PromptConfig, tokenizer: Any, now: datetime) -> None:
        """now: what the template is told of the time, the same for a whole run."""
        if not tokenizer.chat_template:
            raise ValueError(
                'prompt.style = "chat" needs a tokenizer with a chat template, and this model has '
                "none; use an instruction-tuned model or add chat_template.jinja to its folder"
            )
        self.config, self.tokenizer, self.now = config, tokenizer, now
        self._special_tokens = verdict.control_tokens(tokenizer)
        self._check()

    def render(self, turns: Turns) -> list[int]:
        """The ids of a conversation, up to where the assistant's next turn begins."""
        return self.tokenizer.encode(self.text(turns), add_special_tokens=False)

    def text(self, turns: Turns, opened: bool = True) -> str:
        """The text of a conversation; `opened`: up to where the assistant's next turn begins."""
        from transformers.utils import chat_template_utils

        system = [("system", self.config.system)] if self.config.system else []
        messages = [
            {"role": role, "content": verdict.break_tokens(text, self._special_tokens)}
            for role, text in [*system, *turns]
        ]
        # transformers tells every template the time it is, and lets no argument do so.
        compiled = chat_template_utils._compile_jinja_template(self.tokenizer.get_chat_template())
        compiled.globals["strftime_now"] = self.now.strftime
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opened, **self.config.template_args
        )

    def _check(self) -> None:
        """Sets `stop_ids` and `lead`."""
        turns = list(zip(("user", "assistant", "user"), ASKED, strict=True))
        try:
            source = self.tokenizer.get_chat_template()
            whole, opened = self.text(turns), self.text(turns[:1])
            closed = self.text(turns[:1], opened=False)
        # Templates are programs of the model's folder, run in jinja's sandbox.
        except Exception as error:
            asked = "system, " if self.config.system else ""
            raise ValueError(
                f"the chat template cannot render {asked}user, assistant and user turns "
                f"({type(error).__name__}: {error}); take chat_template.jinja of the model again"
                + (", or leave prompt.system empty: it may know no system turn" if asked else "")
            ) from error
        for name in self.config.template_args:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise ValueError(f"prompt.template_args: the chat template never reads {name!r}")
        said = [*ASKED, *filter(None, [self.config.system.strip()])]
        if lost := [part for part in said if part not in whole]:
            raise ValueError(f"the chat template loses turns: {lost} is not in {whole!r}")
        opener, added = _between(whole, *ASKED[:2]), opened.partition(ASKED[0])[2]
        self.lead = self._lead(opener, added, closed.rstrip() == opened.rstrip())
        closing = _between(whole, *ASKED[1:])
        stops = end_ids(self.tokenizer)
        ends = [i for i in self.tokenizer.encode(closing, add_special_tokens=False) if i in stops]
        # Otherwise every completion would run into its limit and be graded as cut off.
        if not ends:
            names = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(list(stops))))
            raise ValueError(
                f"the chat template ends an assistant turn with {closing!r}, which holds none of "
                f"the end tokens ({names}), so no answer would ever stop; add what ends a turn to "
                "eos_token_id in generation_config.json, or set eos_token in tokenizer_config.json"
            )
        self.stop_ids = tuple(dict.fromkeys([ends[0], *stops]))

    def _lead(self, opener: str, added: str, is_ignored: bool) -> str:
        """The white space that is left of what stands between a question and its reply.

        opener  what the template writes there in a conversation
        added   what it writes behind a question that is to be answered
        """
        told = added.rstrip()
        left = opener.removeprefix(told).strip() if opener.startswith(told) else ""
        # One may be longer: a prompt opens a thought, or leaves that to the model.
        agree = opener.startswith(told) or added.startswith(opener.rstrip())
        if not agree or _ROLE.search(left) or (is_ignored and left):
            raise ValueError(
                "the chat template does not open the assistant's turn: between a question and its "
                f"reply it has {opener!r}, and for a reply to come {added!r}; expected is the "
                "same, see add_generation_prompt in chat_template.jinja"
            )
        lead = opener.removeprefix(added)
        return "" if lead.strip() else lead


def _between(text: str, before: str, behind: str) -> str:
    return text.partition(before)[2].partition(behind)[0]
