"""The tokenizer and its chat template: found, loaded, checked; and the template as a function of turns."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hpcft.data.masks import Unrenderable
from hpcft.data.rows import Message
from hpcft.data.sources import DataFile, snapshot
from hpcft.errors import Refusal, refuse
from hpcft.plan.plan import DataPlan

CHATML = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
BUILT_IN = {"chatml": CHATML}

# A template that writes today's date would give other tokens tomorrow; shards must not depend on the day.
FIXED_DAY = datetime(2024, 7, 26)
FIXED_DATE = FIXED_DAY.strftime("%d %b %Y")
DATED = "strftime_now"
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
PARTS = [f"%{part}" for part in (*"aAbBcdDeFHIjmMpRSTuUwWxXyY", "-d", "-m", "-H", "-I")]  # of strftime's language

FILES = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.\w+|merges\.txt|.*\.model|.*\.tiktoken"
    r"|chat_template.*|.*\.jinja|config\.json|.*\.py)"
)


PROBE = ("hpcft0words", "hpcft0first", "hpcft0second")  # of a turn that tries out what a template writes
OVERRIDING = ("chat_template.jinja", "chat_template.json", "added_tokens.json", "special_tokens_map.json")


def folder_of(data: DataPlan) -> Path:
    """The folder of the tokenizer. Raises Refusal where it is not on this machine."""
    if data.tokenizer_source != "local":
        return snapshot(data.tokenizer, data.tokenizer_source, data.tokenizer_revision, "model", data.trust_remote_code)
    folder = Path(data.tokenizer).expanduser()
    if not folder.is_dir():
        raise refuse("no such folder for the tokenizer", value=data.tokenizer, hint="model: a folder or a hub name")
    return folder


def files_of(data: DataPlan, folder: Path) -> list[DataFile]:
    """The files that decide how text becomes tokens; their content is part of the shards' address.

    Among them are files that are not there but would override others, so that their arrival is noticed.
    """
    pinned = data.tokenizer_source != "local"
    paths = sorted(path for path in folder.iterdir() if path.is_file() and FILES.fullmatch(path.name))
    paths += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if not any(path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model" for path in paths):
        raise refuse("this folder holds no tokenizer", where=data.tokenizer, hint="tokenizer.json is missing there")
    paths += [folder / name for name in OVERRIDING if not (folder / name).exists()]
    return [DataFile(path, f"{data.tokenizer.rstrip('/')}/{path.relative_to(folder)}", pinned) for path in paths]


def template_file(data: DataPlan) -> DataFile | None:
    """The file of the chat template where the plan names one by path."""
    name = data.chat_template
    if name is None or name in BUILT_IN:
        return None
    path = Path(name).expanduser()
    if not (path.is_file() or "/" in name or "." in name):
        return None
    if not path.is_file():
        raise refuse("no such file for the chat template", where="chat_template", value=name, choices=BUILT_IN)
    return DataFile(path, name)


def load(data: DataPlan, folder: Path) -> Any:
    """The fast tokenizer of ``folder``. Raises Refusal where it cannot be loaded or gives no character offsets."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=data.trust_remote_code)
    except Exception as error:  # transformers raises anything from OSError to KeyError for a folder it cannot use
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise refuse(f"the tokenizer cannot be loaded: {said[0]}", where=data.tokenizer) from error
    if not tokenizer.is_fast:
        raise refuse(
            "this tokenizer is not a fast one, so nobody can say which token stands for which characters",
            where=data.tokenizer,
            value=type(tokenizer).__name__,
            hint="save it with a tokenizer.json (transformers converts most of them)",
        )
    return tokenizer


class Template:
    """A chat template as a function: turns → text."""

    def __init__(self, tokenizer: Any, data: DataPlan) -> None:
        self.tokenizer = tokenizer
        self.text = _chosen(tokenizer, data)
        self.dated = any(DATED in text for text in _texts(self.text or tokenizer.chat_template))
        if self.dated and self.text is None:
            self.text = tokenizer.get_chat_template()
        if self.dated:
            self.text = f"{_fixed_day(self.text or '')}{self.text}"
        code = " ".join(COMMENT.sub(" ", text) for text in _texts(self.text or tokenizer.chat_template))
        self.writes_tools = re.search(r"\btools\b", code) is not None
        self.knows_developers = re.search(r"['\"]developer['\"]", code) is not None  # not just in its own words
        self.doubted = True
        self.joining: dict[bool, tuple[bool, bool]] = {}
        self.plain = _plain(tokenizer, self.text) if self.exists else None

    @property
    def exists(self) -> bool:
        """Whether there is a template at all; raw text does without."""
        return bool(self.text or self.tokenizer.chat_template)

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool) -> str:
        """The turns as text; prompt: with the opening of an assistant turn at the end. Raises Unrenderable."""
        turns, schemas = _spoken(messages), list(tools) if tools else None
        try:
            return str(self._applied(turns, schemas, prompt))
        except Unrenderable:
            if not any(turn.get("tool_calls") for turn in turns):
                raise
            with contextlib.suppress(Unrenderable):
                return str(self._applied(_joinable(turns), schemas, prompt))
            raise

    def joins(self, with_tools: bool) -> tuple[bool, bool]:
        """Whether the template writes words and a call in one turn of the assistant, and whether two calls.

        Many write only the one or the other, some refuse a second call: this is tried out, once.
        """
        if with_tools not in self.joining:
            self.joining[with_tools] = (
                self._writes(PROBE[0], PROBE[1:2], with_tools),
                self._writes("", PROBE[1:], with_tools),
            )
        return self.joining[with_tools]

    def _writes(self, words: str, said: Sequence[str], with_tools: bool) -> bool:
        """Whether a turn of ``words`` and calls, ``said`` among their arguments, is written with all of them."""
        calls = [
            {"id": f"hpcftcal{n}", "type": "function", "function": {"name": "probe", "arguments": {"said": text}}}
            for n, text in enumerate(said)
        ]
        results = [{"role": "tool", "name": "probe", "content": "r", "tool_call_id": call["id"]} for call in calls]
        turns: list[Message] = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": words, "tool_calls": calls},
            *results,
            {"role": "assistant", "content": "a"},
        ]
        schema = {"name": "probe", "description": "probe", "parameters": {"type": "object", "properties": {}}}
        try:
            text = self(turns, [{"type": "function", "function": schema}] if with_tools else None, False)
        except Unrenderable:
            return False
        return all(part in text for part in (words, *said))

    def many(self, asked: Sequence[tuple[Sequence[Message], int]], prompt: bool) -> list[str]:
        """The first so many turns of each conversation, without tools, as text. Raises Unrenderable at a fault."""
        whole = {id(turns): _spoken(turns) for turns, _ in asked}
        parts = [whole[id(turns)][:n] for turns, n in asked]
        if self.plain is None or not all(len(turn) == 2 for turns in whole.values() for turn in turns):
            return [str(text) for text in self._applied(parts, None, prompt)]
        try:
            texts = [self.plain(turns, prompt) for turns in parts]
        except Exception as error:
            raise Unrenderable(str(error).strip() or type(error).__name__) from error
        if self.doubted:  # once in each process: what stands between template and text is transformers' to change
            self.doubted = False
            if texts != self._applied(parts, None, prompt):
                self.plain = None
                return self.many(asked, prompt)
        return texts

    def _applied(self, conversation: list[Any], tools: list[Any] | None, prompt: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                conversation, tools=tools, chat_template=self.text, add_generation_prompt=prompt, tokenize=False
            )
        except Exception as error:  # a template may raise whatever Jinja, or its own author, thought of
            raise Unrenderable(str(error).strip() or type(error).__name__) from error


def _plain(tokenizer: Any, text: str | None) -> Callable[[list[Message], bool], str] | None:
    """The compiled template itself, for turns of a role and a text and nothing else; None where it is not to be had.

    Around it ``apply_chat_template`` copies every turn and looks for keys that such turns have not, and Jinja makes a
    context anew for every text: together several times as long as the rendering.
    """
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template = _compile_jinja_template(tokenizer.get_chat_template(text))
        given = {**template.globals, "tools": None, "documents": None, **tokenizer.special_tokens_map}
        context, write = template.new_context(given, shared=True), template.root_render_func
    except Exception:  # whatever is wrong with the template is said when a row is written with it
        return None

    def plain(messages: list[Message], prompt: bool) -> str:
        given["messages"], given["add_generation_prompt"] = messages, prompt
        context.vars.clear()  # what the template set for the text before is none of this one's
        context.exported_vars.clear()
        return "".join(write(context))

    return plain


def _joinable(messages: Sequence[Message]) -> list[Message]:
    """``messages`` with the arguments of calls as JSON text: some templates (DeepSeek's) join them to other text."""

    def call(given: dict[str, Any]) -> dict[str, Any]:
        arguments = given["function"].get("arguments")
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**given, "function": {**given["function"], "arguments": arguments}}

    return [
        {**turn, "tool_calls": [call(given) for given in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in messages
    ]


def _fixed_day(text: str) -> str:
    """The function of the date as a macro: what transformers hands to a template by name must not be callable.

    text: the template; of the parts of a date only those that it names are looked for, which takes time in each text.
    """
    parts = "".join(f".replace('{part}', '{FIXED_DAY.strftime(part)}')" for part in PARTS if part in text)
    return f"{{%- macro {DATED}(format) -%}}{{{{ format{parts} }}}}{{%- endmacro -%}}"


def _spoken(messages: Sequence[Message]) -> list[Message]:
    return [
        {key: value for key, value in turn.items() if key != "loss"} if "loss" in turn else turn for turn in messages
    ]


def _chosen(tokenizer: Any, data: DataPlan) -> str | None:
    """The text of the template that the plan names; None: the tokenizer's own."""
    name = data.chat_template
    own = tokenizer.chat_template
    if name is None:
        return None
    if file := template_file(data):
        return file.path.read_text(encoding="utf-8")
    if isinstance(own, dict) and name in own:
        return str(own[name])
    if name not in BUILT_IN:
        choices = [*BUILT_IN, *(own if isinstance(own, dict) else ()), "a file"]
        raise refuse("unknown chat template", where="chat_template", value=name, choices=choices)
    if lacking := [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]:
        raise refuse(
            f"the tokenizer has no token {' and '.join(lacking)}, which chatml writes",
            where="chat_template",
            value=name,
            hint=f"write a template file that ends each assistant turn with {tokenizer.eos_token or 'a token it has'}",
        )
    return BUILT_IN[name]


def _texts(template: Any) -> list[str]:
    return [str(text) for text in template.values()] if isinstance(template, dict) else [str(template or "")]


def no_template(data: DataPlan, where: str) -> Refusal:
    """The refusal of a conversation for a tokenizer that has no chat template."""
    return refuse(
        "the tokenizer has no chat template and none is given, so turns cannot be written as text",
        where=where,
        value=data.tokenizer,
        choices=[*BUILT_IN, "a Jinja file"],
        hint="set chat_template",
    )
