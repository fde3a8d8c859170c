"""Which tokens stand for which characters: by bytes and by asking, always what the list of all offsets says."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hpcft.data import reach
from hpcft.data.reach import Asked, Encodings, Measured

PIECES = [
    *("the answer", " ", "\n\n", "四", "🙂", "👩‍👩‍👧", "e\u0301", "é", "<|im_end|>", "<think>", "two and two"),
    *("naïve", "\t", "42", "   ", "\u200b", "ﬁ", "Å", "가", "\u1100\u1161", "a\u0323\u0307", "q\u0307\u0323"),
]  # fmt: skip
SPLIT = r"\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def made(normalizer: Any = None, pre: Any = None, post: Any = None, **added: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of a few hundred tokens, byte-level unless told otherwise."""
    backend = Tokenizer(models.BPE())
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the answer is two and two 42 naïve 四 🙂 "] * 9, trainer)
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, **added)])
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("四四", special=False)])
    if post:
        backend.post_processor = post
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def texts(count: int) -> list[str]:
    draw = random.Random(7)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 14))) for _ in range(count)]


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITTING = pre_tokenizers.Split(Regex(SPLIT), "isolated")
KINDS = {
    "gpt2": made(),
    "qwen": made(normalizers.NFC(), pre_tokenizers.Sequence([SPLITTING, BYTE_LEVEL])),
    "digits": made(None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])),
    "stripping": made(lstrip=True, rstrip=True),
    "untrimmed": made(post=processors.ByteLevel(trim_offsets=False)),
}  # fmt: skip
OTHERS = {
    "prefix": made(None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "trimmed": made(post=processors.ByteLevel(trim_offsets=True)),
    "lower": made(normalizers.Lowercase()),
    "nfkc": made(normalizers.NFKC()),
    "dropping": made(None, pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), BYTE_LEVEL])),
}


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_the_tokens_of_a_stretch_are_those_that_the_offsets_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a character, several characters in a token, stretches that begin and end inside of both."""
    monkeypatch.setattr(reach, "DOUBTED", 0)
    tokenizer = (KINDS | OTHERS)[kind]
    backend, draw = tokenizer.backend_tokenizer, random.Random(8)
    some = texts(400)
    found = Encodings(tokenizer)(some, special=False)
    for text, tokens in zip(some, found, strict=True):
        encoding = backend.encode(text, add_special_tokens=False)
        assert tokens.ids.tolist() == encoding.ids
        for _ in range(6):
            start, end = sorted(draw.choices(range(len(text) + 1), k=2))
            if start == end:
                continue
            named = [n for n, (first, past) in enumerate(encoding.offsets) if first < end and past > start]
            assert list(range(*tokens.reach(start, end))) == named, (text, start, end)
            assert tokens.reach(start, end)[1] == sum(first < end for first, _ in encoding.offsets)
    measured = sum(isinstance(tokens, Measured) for tokens in found)
    assert measured == 0 if kind in OTHERS else measured > 100, "the short way is taken where it is known to be right"


def test_the_first_texts_are_looked_at_both_ways_and_the_short_one_given_up_where_they_differ() -> None:
    encodings = Encodings(made())
    assert encodings.bytes is not None
    some = ["the answer is two"] * (reach.DOUBTED + 5)
    kinds = [type(tokens) for tokens in encodings(some, special=False)]
    assert kinds == [Asked] * reach.DOUBTED + [Measured] * 5
    wrong = Encodings(made())
    assert wrong.bytes is not None
    the, answer = wrong.backend.encode("the answer").ids[0], wrong.backend.encode("the answer").ids[-1]
    wrong.bytes[the], wrong.bytes[answer] = wrong.bytes[the] - 1, wrong.bytes[answer] + 1
    kinds = [type(tokens) for tokens in wrong(["the answer"] * (reach.DOUBTED + 5), special=False)]
    assert wrong.bytes is None
    assert set(kinds) == {Asked}


def test_only_texts_that_the_normaliser_leaves_alone_go_past_it() -> None:
    tokenizer = KINDS["qwen"]
    encodings = Encodings(tokenizer)
    assert encodings.plain.normalizer is None
    encodings.doubted = 0
    tokens, other = encodings(["na\u00efve", "nai\u0308ve"], special=False)
    assert (type(tokens), type(other)) == (Measured, Asked)
    assert tokens.ids.tolist() == other.ids.tolist()


def test_a_tokenizer_whose_added_tokens_are_normalised_keeps_its_normaliser() -> None:
    tokenizer = made(normalizers.NFC())
    tokenizer.add_tokens(["e\u0301nd"])
    encodings = Encodings(tokenizer)
    assert encodings.plain is encodings.backend
    (tokens,) = encodings(["the \u00e9nd"], special=False)
    assert tokens.ids.tolist() == tokenizer("the \u00e9nd", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_with_code_of_its_own_is_asked_itself() -> None:
    class Own(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **words: Any) -> Any:
            return super().__call__(*args, **words)

    encodings = Encodings(Own(tokenizer_object=made().backend_tokenizer))
    assert not encodings.direct
    (tokens,) = encodings(["the answer"], special=False)
    assert tokens.reach(0, 3)[0] == 0
