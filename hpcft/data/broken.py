"""What to do about a line that is no JSON: the commonest reason for each of the parser's complaints."""

from __future__ import annotations

import json
import re

LFS = "version https://git-lfs"
CUT_OFF = "was the file cut off while it was copied?"
# How the parser's sentence begins → what a person does about it.
HINTS = {
    "Expecting ',' delimiter": 'a comma is missing here, or a quote inside a text is not written \\"',
    "Expecting ':' delimiter": "a colon stands between a key and its value",
    "Expecting property name": "keys stand in double quotes",
    "Unterminated string": "no quote ends this text; a line break inside of one is written \\n",
    "Invalid control character": "inside a text a line break is written \\n and a tab \\t",
    "Invalid \\": "inside a text a backslash is written \\\\",
    "Extra data": "one record a line: what follows the first one belongs on a line of its own",
}
WORDS = {"True": "true", "False": "false", "None": "null", "nan": "null", "undefined": "null"}


def hint(error: Exception, text: str, start: int = 0) -> str:
    """For the record of ``text`` that begins at ``start``; never empty."""
    if not isinstance(error, json.JSONDecodeError):
        deep = isinstance(error, RecursionError)
        return "no record nests so deeply: is the line whole?" if deep else "write a number of so many digits as a text"
    at, lines = error.pos, start == 0
    if text.startswith(LFS):
        return "this is Git LFS's pointer to the file: git lfs pull"
    if lines and text.strip() == "{":
        return "a file is either a list [ … ] of records or one whole record per line"
    if re.search(r",\s*[\]}]", text[max(start, at - 3) : at + 3]):
        return "remove the trailing comma"
    if "'" in text[at : at + 2]:
        return "JSON wants double quotes"
    if lines and at >= len(text.rstrip()) and error.msg.startswith("Invalid control"):  # the end of the line, in a text
        return HINTS["Unterminated string"]
    if at >= len(text.rstrip()):
        return f"the record ends in the middle: {CUT_OFF}"
    if word := next((word for word in WORDS if text.startswith(word, at)), ""):
        return f"JSON spells {word} {WORDS[word]}"
    if at == start and lines:
        return "a record is an object {…} on one line: is this a file of records?"
    return next((said for begins, said in HINTS.items() if error.msg.startswith(begins)), "a value is missing here")
