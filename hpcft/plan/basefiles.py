"""A base model's folder, looked at before anything is asked of a GPU: its config.json and the headers of its weights.

Said is what no other try would change. What only transformers knows, such as which families it has, the ranks find out;
what cannot be judged here, such as pickled weights or names of another manner, is left to them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpcft.errors import Problem
from hpcft.plan.modules import modules_of, unmatched
from hpcft.plan.plan import Plan

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Classes for a text's whole or its gaps, for pictures or for sound: no decoder that says the next token.
OTHER_CLASSES = re.compile(
    r"(EncoderModel|For(MaskedLM|PreTraining|QuestionAnswering|TokenClassification|MultipleChoice|CTC|Seq2SeqLM"
    r"|SpeechSeq2Seq|Vision2Seq|(Image|Audio|Video)Classification))$"
)
# Families named ForConditionalGeneration of which transformers makes no decoder of text; of others (Gemma 3, Qwen 3.5)
# it does, so that only the ranks can tell of a family that is not here.
READING = r"t5|mt5|umt5|t5gemma2?|longt5|switch_transformers|bart|mbart|pegasus|pegasus_x|plbart|m2m_100|marian|led"
SEEING = (
    r"qwen[23](_5)?_vl(_moe)?|llava\w*|idefics\d?|smolvlm|internvl|paligemma|mistral3|pixtral|glm4v(_moe)?|aria"
    r"|blip\w*|instructblip\w*|deepseek_vl\w*|janus|chameleon|kosmos\w*|florence2|pix2struct|video_llama\w*"
)
HEARING = r"whisper|qwen2_audio\w*|qwen[23](_5)?_omni\w*|voxtral|granite_speech|audioflamingo3|speech_to_text"
OTHER_FAMILIES = re.compile(f"{READING}|{SEEING}|{HEARING}")
UNPACKED = ("mxfp4",)  # quantised, and given back by transformers as ordinary weights
ALIKE = ("llama", "mistral", "qwen2", "qwen3")  # every layer has the tensors that the others have, the head is untied
LARGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no more
SHOWN = 6  # names in one complaint
AGAIN = "copy or download the model again"


def unusable(folder: Path, plan: Plan) -> list[Problem]:
    """Why the base model in ``folder`` cannot be trained as ``plan`` says; empty where nothing speaks against it."""
    try:
        config = read_config(folder)
        found = list(config_problems(config, plan.model.trust_remote_code))
        if plan.model.from_scratch or found:
            return found
        return list(_weights(folder, config, plan.scored))
    except FileNotFoundError as error:
        if Path(str(error.filename)).name == "config.json":
            return [Problem("model: no model is there", value=str(error.filename), hint="a folder with config.json")]
        # A link whose file is gone, as in a copy of a hub's cache.
        return [Problem("model: files of its weights are missing", value=str(error.filename), hint=AGAIN)]
    except OSError as error:
        return [unreadable(error, folder)]


def unfit(config: Mapping[str, Any], plan: Plan) -> dict[str, list[Problem]]:
    """Leaf → what speaks against training the model of a config.json as ``plan`` says."""
    found = {"model": list(config_problems(config, plan.model.trust_remote_code))}
    names = modules_of(config, plan.scored)
    return {**found, **unmatched(plan.tuner, names)} if names else found


def read_config(folder: Path) -> Mapping[str, Any]:
    """The folder's config.json; empty where it is not one. Raises OSError where it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def config_problems(config: Mapping[str, Any], trusted: bool) -> Iterator[Problem]:
    """What a config.json says that is not trained here: no decoder, or weights quantised beforehand."""
    classes = config.get("architectures")
    kind = str(classes[0]) if isinstance(classes, list) and classes else ""
    own_code = trusted and bool(config.get("auto_map"))
    conditional = kind.endswith("ForConditionalGeneration") or not kind
    other = conditional and OTHER_FAMILIES.fullmatch(str(config.get("model_type")))
    if not own_code and (other or OTHER_CLASSES.search(kind) or config.get("is_encoder_decoder")):
        yield Problem(
            "model: this is no decoder of text",
            value=kind or str(config.get("model_type")),
            hint="a base whose config.json says …ForCausalLM, such as Qwen/Qwen2.5-7B-Instruct",
        )
    for key in ("quantization_config", "compression_config"):
        said = config.get(key)
        method = str(said.get("quant_method") or key) if isinstance(said, dict) and said else ""
        if method and method not in UNPACKED:
            yield Problem(
                f"model: its weights were quantised beforehand, by {method}; that is not in this release",
                value=kind,
                hint="the unquantised base model, with quant_bits: 4 (QLoRA) or base_precision: fp8, and LoRA",
            )
            return


def lacking(names: Iterable[str]) -> Problem:
    """The complaint about tensors that the model has and its files have not."""
    absent = sorted(names)
    more = f" and {len(absent) - SHOWN:,} more" if len(absent) > SHOWN else ""
    return Problem(
        "model: its files lack weights, which would begin at random",
        value=", ".join(absent[:SHOWN]) + more,
        hint=f"{AGAIN}; or from_scratch: true, to train all of it from random weights",
    )


def unreadable(error: OSError, path: Path) -> Problem:
    """The complaint about a file or folder that the operating system does not give."""
    return Problem(
        f"model: cannot be read: {error.strerror or error}",
        value=str(error.filename or path),
        hint="ls -ld shows its rights",
    )


def _weights(folder: Path, config: Mapping[str, Any], scored: bool) -> Iterator[Problem]:
    there = set(os.listdir(folder))
    # An adapter's folder, and names of the files that the configuration gives itself: transformers knows its way.
    if "adapter_config.json" in there or config.get("transformers_weights"):
        return
    shards = _shards(folder / INDEX) if INDEX in there else {}
    absent = _absent(folder, shards)
    if shards and (SINGLE not in there or not absent):
        if absent:
            more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
            yield Problem("model: files of its weights are missing", value=", ".join(absent[:SHOWN]) + more, hint=AGAIN)
        else:
            yield from _safetensors(folder, shards, config, scored)
    elif SINGLE in there:
        yield from _safetensors(folder, {}, config, scored)
    elif PICKLED_INDEX in there:
        if absent := _absent(folder, _shards(folder / PICKLED_INDEX)):
            yield Problem("model: files of its weights are missing", value=", ".join(absent[:SHOWN]), hint=AGAIN)
    elif INDEX in there:
        yield Problem("model: no index of weights can be read", value=str(folder / INDEX), hint=AGAIN)
    elif PICKLED not in there:
        yield Problem(
            f"model: no weights are there: neither {SINGLE} nor {INDEX}",
            value=str(folder),
            hint=f"{AGAIN}; or from_scratch: true, to begin with random weights",
        )


def _absent(folder: Path, shards: Mapping[str, str]) -> list[str]:
    return sorted(file for file in set(shards.values()) if not (folder / file).exists())


def _shards(index: Path) -> dict[str, str]:
    """Tensor → file, as an index says; empty for what is no index."""
    try:
        said = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _safetensors(folder: Path, shards: Mapping[str, str], config: Mapping[str, Any], scored: bool) -> Iterator[Problem]:
    """shards: tensor → file; empty for the one file."""
    names, broken = set[str](), False
    for file in sorted(set(shards.values())) or [SINGLE]:
        found, why = tensors_of(folder / file)
        names |= found
        if why:
            broken = True
            yield Problem(f"model: its weights cannot be read: {why}", value=str(folder / file), hint=AGAIN)
    tied = bool(config.get("tie_word_embeddings"))  # then an index may name a head that no file has
    lost = {name for name in shards.keys() - names if not (tied and name.endswith("lm_head.weight"))}
    if not broken and (absent := {*lost, *absent_tensors(names, config, scored)}):
        yield lacking(absent)


def tensors_of(file: Path) -> tuple[set[str], str]:
    """The tensors that a safetensors file has by its header, and what is wrong with the file. Raises OSError."""
    with open(file, "rb") as stream:
        size, first = os.fstat(stream.fileno()).st_size, stream.read(8)
        if first.startswith(b"version "):
            return set(), "this is a pointer of Git LFS and not the file (git lfs pull)"
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, LARGEST_HEADER):
            return set(), f"it ends inside of its header, after {size:,} bytes"
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            end = 8 + length + max((int(last) for _, last in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return set(), "its header is no safetensors header"
    return set(tensors), "" if end == size else f"its header tells of {end:,} bytes, and it has {size:,}"


def absent_tensors(names: set[str], config: Mapping[str, Any], scored: bool) -> set[str]:
    """Layers without a single tensor, and of the plainest families every tensor that is not there.

    Only where the names follow the configuration's number of layers in one stack; nothing is said of others.
    """
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config
    count = next((text[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in text), None)
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if found := re.match(r"((?:[A-Za-z_]\w*\.)*(?:layers|h|blocks))\.([0-9]{1,6})\.(.+)$", name):
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(found[3])
    if len(stacks) != 1 or not isinstance(count, int) or config.get("auto_map"):
        return set()
    (stack, layers), family = next(iter(stacks.items())), text.get("model_type")
    absent = {f"{stack}.{number}.*" for number in range(count) if number not in layers}
    if family in ALIKE:
        decoder = {number: mine for number, mine in layers.items() if number < count}
        every = {rest for mine in decoder.values() for rest in mine if not rest.endswith("inv_freq")}  # no weight
        absent |= {f"{stack}.{number}.{rest}" for number, mine in decoder.items() for rest in every - mine}
        body = stack.removesuffix("layers")
        ends = {f"{body}embed_tokens.weight", f"{body}norm.weight"}
        head = any(name.endswith("lm_head.weight") for name in names)
        if text.get("tie_word_embeddings") and head:  # one weight, under either name
            ends.discard(f"{body}embed_tokens.weight")
        elif not text.get("tie_word_embeddings") and not scored and not head:
            ends.add("lm_head.weight")
        absent |= ends - names
    return absent
