"""What is trained in the chat forms of public models, as text: masks/*.txt, a file for each form in families/.

The forms are written out here by hand, for the texts they make. ``python -m tests.golden`` writes the files anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hpcft.data.documents import Document
from hpcft.data.encode import Encoder
from hpcft.data.inspect import BRACKETED, marked
from hpcft.data.shapes import Shaped
from hpcft.data.tokenizer import load
from tests.data.small import chat, request, write_tokenizer

FOLDER, GOLDEN = Path(__file__).parent / "families", Path(__file__).parent / "masks"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}

CHATS: dict[str, dict[str, Any]] = {
    "two turns": chat("What are two and two?", "Four, I say.", "And three?", "Five: 五 🙂"),
    "a system prompt": {"system": "Be brief.", **chat("What are two and two?", "Four.")},
    "thoughts": chat(
        "Two and two?",
        "<think>\ntwo, then two more\n</think>\n\nFour.",
        "Three?",
        "<think>\none more\n</think>\n\nFive.",
    ),
    "a tool call": {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "What are two and three?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "Five."},
        ],
    },
}


@dataclass(frozen=True)
class Form:
    """end: what closes an answer. specials: tokens of the family; bos, eos: two of them. opening: what of an answer the
    prompt does not give. last, last_opening: of the last answer, where they are others. more: chats beside two."""

    end: str
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None
    opening: str = ""
    last: str = ""
    last_opening: str = ""
    more: tuple[str, ...] = ()

    @property
    def chats(self) -> tuple[str, ...]:
        return ("two turns", "a system prompt", *self.more)

    def answers(self, words: Sequence[str]) -> list[str]:
        """What is to be trained of an assistant's words."""
        *earlier, last = words
        begin, end = self.last_opening or self.opening, self.last or self.end
        return [*(f"{self.opening}{said}{self.end}" for said in earlier), f"{begin}{last}{end}"]


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
            "[TOOL_RESULTS]", "[/TOOL_RESULTS]")  # fmt: skip
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_THOUGHTS, _TOOLS = ("thoughts",), ("a tool call",)

FORMS: dict[str, Form] = {
    "chatml": Form("<|im_end|>", _CHATML, "<|im_end|>", more=_THOUGHTS),
    "llama3": Form("<|eot_id|>", _LLAMA, "<|eot_id|>", "<|begin_of_text|>", more=_TOOLS),
    "mistral": Form("</s>", _MISTRAL, "</s>", "<s>", opening=" ", more=_TOOLS),
    "gemma": Form("<end_of_turn>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"),
    "phi3": Form("<|end|>", ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>"),
    "phi4": Form("<|im_end|>", (*_CHATML, "<|im_sep|>"), "<|im_end|>"),
    "deepseek": Form(_DEEPSEEK[1], _DEEPSEEK, _DEEPSEEK[1], _DEEPSEEK[0], more=_THOUGHTS),
    "qwen3": Form("<|im_end|>", _CHATML, "<|im_end|>", last_opening="<think>\n\n</think>\n\n",
                  more=(*_THOUGHTS, *_TOOLS)),
    "hermes": Form("<|im_end|>", _CHATML, "<|im_end|>", more=_TOOLS),
    "glm4": Form("<|user|>", ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"),
                 "<|endoftext|>", last="<|endoftext|>"),
    "harmony": Form("<|end|>", ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"), "<|return|>",
                    opening="<|channel|>final<|message|>", last="<|return|>"),
}  # fmt: skip


@cache
def encoder(name: str) -> tuple[Encoder, Any]:
    """What turns rows of a form into documents, and its tokenizer."""
    form = FORMS[name]
    with tempfile.TemporaryDirectory() as place:
        text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        folder = write_tokenizer(Path(place), text=text, specials=form.specials, eos=form.eos, bos=form.bos)
        data = request(tokenizer=folder, max_length=4096)
        tokenizer = load(data, folder)
        return Encoder(data, tokenizer), tokenizer


def document(name: str, title: str) -> Document:
    """One of CHATS in a form."""
    found = encoder(name)[0].documents([Shaped("chats").row(1, CHATS[title])])[0]
    assert isinstance(found, Document), found
    return found


def shown(name: str, title: str) -> str:
    """The text of a chat with the trained tokens between ⟦ and ⟧."""
    made = document(name, title)
    return marked(made.tokens.tolist(), made.trained.tolist(), encoder(name)[1], BRACKETED)


def page(name: str) -> str:
    """The golden file of a form."""
    about = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").partition("#}")[0].removeprefix("{#-")
    lines = [f"{name}. {' '.join(about.split())}", "Trained is what stands between ⟦ and ⟧."]
    for title in FORMS[name].chats:
        lines += ["", f"──────── {title}", shown(name, title)]
    return "\n".join(line.rstrip("\n") for line in lines) + "\n"


def goldens() -> Iterator[tuple[Path, Callable[[], str]]]:
    """Every golden file and what it should hold."""
    for name in FORMS:
        yield GOLDEN / f"{name}.txt", lambda name=name: page(name)  # type: ignore[misc]
