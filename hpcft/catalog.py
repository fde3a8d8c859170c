"""What can be plugged in, as rows of plain facts; each row names its module by string, loaded when used.

A strategy, an objective or a data format is one file and one row here; ``tests/test_catalog.py`` closes the
loop between rows, files and docs. Nothing is imported here, so a login node can read the table in no time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """How the model is spread over ranks.

    axes: the mesh axes it knows, outermost first; others have degree 1. shards: what is cut into a part per rank of
    the axis ``dp``: optimizer, gradients, weights. offload: what lies in host memory: optimizer, weights.
    needs: a package that is not installed with hpcft. main_params: types in which it can keep trained weights and
    moments.
    """

    name: str
    module: str
    axes: tuple[str, ...]
    about: str
    shards: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    needs: str = ""
    main_params: tuple[str, ...] = ("float32",)

    @property
    def gathers_by_module(self) -> bool:
        """Are weights whole only while the very module runs that has them?"""
        return self.module == _ZERO and "weights" in self.shards


@dataclass(frozen=True)
class Objective:
    """What is minimised. rows: the kind of prepared row it needs; keys: what of section ``objective`` it looks at.

    head: what the model says: probabilities of tokens, or scores of a text.
    """

    name: str
    module: str
    rows: str
    about: str
    keys: tuple[str, ...] = ()
    head: str = "tokens"  # tokens | score


@dataclass(frozen=True)
class Format:
    """A shape of data record.

    keys: one of these sets of keys must be present. sample: one record as JSON. rows: the kind of row it becomes, as
    an objective asks for it.
    """

    name: str
    module: str
    keys: tuple[frozenset[str], ...]
    sample: str
    about: str
    rows: str = "chat"


AUTO = "auto"  # the strategy that is chosen by memory and speed; a word of a run, never of a Plan
_ZERO, _FSDP = "hpcft.train.strategies.zero", "hpcft.train.strategies.fsdp"
_ALL = ("optimizer", "gradients", "weights")
_BOTH = ("float32", "bfloat16")

STRATEGIES: dict[str, Strategy] = {
    row.name: row
    for row in (
        Strategy(
            "ddp", "hpcft.train.strategies.ddp", ("dp", "tp"), "every rank holds the whole model; gradients are summed",
            main_params=_BOTH,
        ),
        Strategy("zero1", _ZERO, ("dp",), "DeepSpeed, optimizer states sharded", _ALL[:1], needs="deepspeed"),
        Strategy(
            "zero2", _ZERO, ("dp",), "DeepSpeed, optimizer states and gradients sharded", _ALL[:2], needs="deepspeed"
        ),
        Strategy("zero3", _ZERO, ("dp",), "DeepSpeed, weights sharded too", _ALL, needs="deepspeed"),
        Strategy(
            "zero2_offload", _ZERO, ("dp",), "zero2 with the optimizer in host memory", _ALL[:2], _ALL[:1], "deepspeed"
        ),
        Strategy(
            "zero3_offload", _ZERO, ("dp",), "zero3 with optimizer and weights in host memory", _ALL,
            ("optimizer", "weights"), "deepspeed",
        ),
        Strategy(
            "fsdp", _FSDP, ("dp_replicate", "dp", "tp"),
            "torch's FSDP2: weights, gradients and optimizer sharded; dp_replicate > 1 makes it HSDP", _ALL,
            main_params=_BOTH,
        ),
        Strategy(
            "fsdp_offload", _FSDP, ("dp_replicate", "dp", "tp"), "fsdp with weights and optimizer in host memory", _ALL,
            ("optimizer", "weights"), main_params=_BOTH,
        ),
    )
}  # fmt: skip
_REFERENCE, _OBJECTIVES = ("beta", "reference"), "hpcft.train.objectives."

OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("sft", _OBJECTIVES + "sft", "chat", "next-token loss on the assistant's words"),
        Objective("pretrain", _OBJECTIVES + "sft", "chat", "next-token loss on every token, of texts and of chats"),
        Objective(
            "dpo", _OBJECTIVES + "dpo", "pair", "a chosen answer over a rejected one, against the model it began as",
            (*_REFERENCE, "loss_type", "label_smoothing", "rpo_alpha"),
        ),
        Objective(
            "kto", _OBJECTIVES + "kto", "rated", "answers that are each good or bad, against the model it began as",
            (*_REFERENCE, "desirable_weight", "undesirable_weight"),
        ),
        Objective("orpo", _OBJECTIVES + "orpo", "pair", "the chosen text, and its odds over the rejected", ("beta",)),
        Objective(
            "cpo", _OBJECTIVES + "cpo", "pair", "a chosen answer over a rejected one, and the chosen one; no reference",
            ("beta", "loss_type", "label_smoothing", "cpo_alpha"),
        ),
        Objective(
            "simpo", _OBJECTIVES + "simpo", "pair", "a chosen answer over a rejected one, per token, by a margin",
            ("beta", "label_smoothing", "simpo_gamma", "cpo_alpha"),
        ),
        Objective(
            "rm", _OBJECTIVES + "rm", "pair", "a reward model: a score of a whole text, higher for the chosen one",
            ("center_rewards_coefficient",), "score",
        ),
        Objective(
            "seq_cls", _OBJECTIVES + "seq_cls", "labelled", "the class of a whole text, one of those in the labels",
            head="score",
        ),
    )
}  # fmt: skip

# Files of records that are read; the text kinds may have .gz behind.
DATA_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

# The words that ms-swift's users have for the two halves of a question and its answer, the likeliest first. An input
# beside another of them, or a context, belongs below it.
QUERY_WORDS = ("query", "prompt", "instruction", "question", "problem", "input")
RESPONSE_WORDS = (
    *("response", "answer", "output", "targets", "target", "answer_key", "answers"),
    *("solution", "text", "completion", "content"),
)

BESIDE_QUERY = ("input", "context")

# The names of the two answers of a pair.
CHOSEN_AND_REJECTED = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_messages", "rejected_messages"),
)  # fmt: skip
_TURNS = ("messages", "conversations", "conversation")
_RATED, _LABELLED = "hpcft.data.formats.rated", "hpcft.data.formats.labelled"


def _sets(*choices: tuple[str | tuple[str, ...], ...]) -> tuple[frozenset[str], ...]:
    """Every set that has one word of each choice; a word may be several that go together."""
    flat = ([(word,) if isinstance(word, str) else word for word in choice] for choice in choices)
    return tuple(frozenset(itertools.chain(*words)) for words in itertools.product(*flat))


# The kind of row that an objective asks for → what a record of it has, for those who bring another.
KINDS_OF_ROWS = {
    "chat": "turns whose answers are all to be learned, or raw text",
    "pair": "a prompt with a chosen and a rejected answer",
    "rated": "a prompt with one answer and a label, true or false",
    "labelled": "a text or turns with a label, the name or the number of a class",
}

# The first row whose keys a record has is its shape, so the particular ones come before the general ones. Labelled
# rows have the keys of others and one more: only a run that needs them looks for them, and then first.
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "turns_pair",
            "hpcft.data.formats.turns_pair",
            _sets(_TURNS, CHOSEN_AND_REJECTED),
            '{"conversations": [{"from": "human", "value": "2 + 2?"}],'
            ' "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}}',
            "a conversation up to a question (messages or conversations), a chosen and a rejected answer",
            "pair",
        ),
        Format(
            "pair",
            "hpcft.data.formats.pair",
            _sets(QUERY_WORDS, CHOSEN_AND_REJECTED),
            '{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}',
            "prompt, chosen and rejected, each a text or turns; the prompt may be instruction or question, with input; "
            "the answers may be chosen_response and rejected_response; optional system, history and margin",
            "pair",
        ),
        Format(
            "rejected_response",
            "hpcft.data.formats.rejected_response",
            _sets((*_TURNS, ("query", "response")), ("rejected_response", "rejected_messages")),
            '{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],'
            ' "rejected_response": "5"}',
            "turns that end in the good answer, and the bad one as rejected_response or rejected_messages: a text, "
            "turns, or the whole conversation; optional margin",
            "pair",
        ),
        Format(
            "whole_pair",
            "hpcft.data.formats.whole_pair",
            _sets(CHOSEN_AND_REJECTED),
            '{"chosen": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],'
            ' "rejected": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}]}',
            "chosen and rejected, each a whole conversation: the turns they begin with in common are the prompt",
            "pair",
        ),
        Format(
            "rated_completion",
            _RATED,
            _sets((("prompt", "completion"), ("query", "response")), ("label", "kto_tag"))
            + _sets((("instruction", "output"),), ("kto_tag",)),
            '{"prompt": "2 + 2?", "completion": "4", "label": true}',
            "prompt, completion and a label: true for a good answer, false for a bad one",
            "rated",
        ),
        Format(
            "rated_messages",
            _RATED,
            _sets(("messages",), ("label", "kto_tag")),
            '{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "5"}],'
            ' "label": false}',
            "messages and a label, which speaks of what the assistant says after the user's last words",
            "rated",
        ),
        Format(
            "rated_conversations",
            _RATED,
            _sets(("conversations", "conversation"), ("kto_tag", "label")),
            '{"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "kto_tag": true}',
            "conversations and kto_tag, which speaks of what the assistant says after the user's last words",
            "rated",
        ),
        Format(
            "messages",
            "hpcft.data.formats.messages",
            (frozenset({"messages"}),),
            '{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}',
            "a list of turns with role and content; `tools`, `tool_calls` and per-turn `loss` are kept",
        ),
        Format(
            "sharegpt",
            "hpcft.data.formats.sharegpt",
            (frozenset({"conversations"}), frozenset({"conversation"})),
            '{"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}',
            "a list of turns with from and value, or of human and assistant pairs",
        ),
        Format(
            "alpaca",
            "hpcft.data.formats.alpaca",
            (frozenset({"instruction", "output"}), frozenset({"instruction", "response"})),
            '{"instruction": "Add the numbers.", "input": "2 and 2", "output": "4"}',
            "instruction, optional input or context, output; optional system and history",
        ),
        Format(
            "prompt_completion",
            "hpcft.data.formats.prompt_completion",
            (frozenset({"prompt", "completion"}),),
            '{"prompt": "2 + 2?", "completion": "4"}',
            "prompt and completion, each a text or a list of turns",
        ),
        Format(
            "query_response",
            "hpcft.data.formats.query_response",
            _sets(QUERY_WORDS, RESPONSE_WORDS),
            '{"query": "2 + 2?", "response": "4", "history": [["1 + 1?", "2"]]}',
            "query and response, or one of ms-swift's other words for them; optional input or context, which goes "
            "below the query, system and history",
        ),
        Format(
            "text",
            "hpcft.data.formats.text",
            (frozenset({"text"}),),
            '{"text": "Any text at all."}',
            "raw text: no chat template, every token is trained, the end-of-text token included",
        ),
        Format(
            "labelled_messages",
            _LABELLED,
            _sets(_TURNS, ("label",)),
            '{"messages": [{"role": "user", "content": "Two and two is 4."}], "label": "true"}',
            "messages or conversations, of any length, and the label of the whole",
            "labelled",
        ),
        Format(
            "labelled_text",
            _LABELLED,
            _sets(("text",), ("label",)),
            '{"text": "Two and two is 5.", "label": 0}',
            "raw text and its label: no chat template, nothing added but what the tokenizer adds",
            "labelled",
        ),
        Format(
            "labelled_query",
            _LABELLED,
            _sets(QUERY_WORDS, ("label",)),
            '{"query": "Is two and two 4?", "label": "question"}',
            "query or one of ms-swift's other words for it, and the label; optional response, system and history",
            "labelled",
        ),
    )
}

# Words that people bring from other tools and that this release does not do: name → what to use instead.
LATER_OBJECTIVES: dict[str, str] = {
    "ppo": "dpo",
    "grpo": "dpo",
}
