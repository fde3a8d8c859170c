"""How an exported model speaks: its tokenizer, the chat template of its training, the tokens that end its turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.data import tokenizer as tokenizers
from hpcft.data.documents import Document
from hpcft.data.encode import Encoder
from hpcft.data.rows import Row
from hpcft.errors import refuse
from hpcft.plan.plan import DataPlan, Plan
from hpcft.train.model import local_folder

PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
# Without sampling these have no effect, yet transformers refuses to write a configuration that holds them.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Speech:
    """stops: text → id of every token that ends generation. learned: those that the training data taught, with how
    many turns each of them closed (0: not counted, found by writing one turn). dated: the template writes a date.
    open: the template does not end the last turn, so that training put the tokenizer's end of text behind it."""

    tokenizer: Any
    stops: Mapping[str, int]
    learned: Mapping[str, int]
    generation: Any
    dated: bool
    open: bool = False

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @property
    def padding(self) -> int | None:
        """The token that may fill up what is scored; None where it also ends a text, whose score would be another."""
        ends = {self.stops[text] for text in self.learned} or {self.tokenizer.eos_token_id}
        padding: int | None = self.tokenizer.pad_token_id
        return None if padding in ends else padding

    def write(self, folder: Path, generates: bool = True) -> None:
        """Tokenizer and chat template into ``folder``, and the generation configuration of a model that generates."""
        self.tokenizer.save_pretrained(folder)
        if generates:
            self.generation.save_pretrained(folder)


def speech(plan: Plan, audit: Mapping[str, Any] | None) -> Speech:
    """The words of the run. audit: of the prepared data, None where that is not at hand.

    Raises Refusal where the tokenizer is not there, or is not the one the data was prepared with.
    """
    tokenizer = tokenizers.load(plan.data, tokenizers.folder_of(plan.data))
    template = tokenizers.Template(tokenizer, plan.data)
    written = _written(tokenizer, template, plan.data)
    learned = (
        _audited(tokenizer, audit, plan.data) if audit else dict.fromkeys(written.end_tokens if written else (), 0)
    )
    if plan.data.chat_template is not None:
        tokenizer.chat_template = template.text if not template.dated else template.text.split("endmacro -%}", 1)[1]
    generation = _generation(plan, tokenizer, list(learned))
    texts = {str(tokenizer.convert_ids_to_tokens(token)): token for token in generation.eos_token_id or ()}
    counts = {text: learned[token] for text, token in texts.items() if token in learned}
    return Speech(tokenizer, texts, counts, generation, template.dated, bool(written and written.end_added))


def _audited(tokenizer: Any, audit: Mapping[str, Any], data: DataPlan) -> dict[int, int]:
    """Token → turns that it closed in the training data."""
    for end in audit["end_tokens"]:
        if (now := tokenizer.convert_ids_to_tokens(end["id"])) != end["text"]:
            raise refuse(
                f"the tokenizer has changed since the data was prepared: token {end['id']} was {end['text']}, is {now}",
                where=data.tokenizer,
                hint="restore the model's folder as it was when the run began",
            )
    return {int(end["id"]): int(end["turns"]) for end in audit["end_tokens"]}


def _written(tokenizer: Any, template: Any, data: DataPlan) -> Document | None:
    """One turn, written and tokenised by the code that prepared the data; None where there is no such thing."""
    if not template.exists:
        return None
    document = Encoder(data, tokenizer).documents([Row(messages=PROBE)])[0]
    return None if isinstance(document, str) else document


def _generation(plan: Plan, tokenizer: Any, learned: Sequence[int]) -> Any:
    """The base model's generation configuration, which also stops where the model was taught to stop."""
    from transformers import GenerationConfig

    try:
        trust = {"trust_remote_code": plan.model.trust_remote_code}
        folder = local_folder(plan.model)
        generation = GenerationConfig.from_pretrained(
            folder, revision=plan.model.revision, local_files_only=True, **trust
        )
    except OSError:
        generation = GenerationConfig()
    own = generation.eos_token_id
    wanted = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *learned]
    generation.eos_token_id = list(dict.fromkeys(token for token in wanted if token is not None)) or None
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    if not generation.do_sample:
        for name in SAMPLING:
            setattr(generation, name, None)
    return generation
