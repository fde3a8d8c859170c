"""What an exported folder says of itself: README.md for people, hpcft.json for programs; the same facts in both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcft.errors import printable
from hpcft.plan.plan import QUANTISED, Plan
from hpcft.run import manifest as manifests
from hpcft.train.pick import ADAPTER, MERGED, MODEL
from hpcft.train.score import HEAD
from hpcft.train.speech import Speech

FILE = "hpcft.json"

NO_PADDING = "No token serves as padding that does not also end a text: score one chat at a time."


def write(folder: Path, plan: Plan, told: dict[str, Any], speech: Speech) -> None:
    """README.md and hpcft.json into a folder that holds everything else."""
    (folder / "README.md").write_text(card(plan, told, speech), encoding="utf-8")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": manifests.checksum(path)}
        for path in sorted(folder.iterdir())
    }
    text = json.dumps({**told, "files": files}, indent=2, ensure_ascii=False) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def card(plan: Plan, told: dict[str, Any], speech: Speech) -> str:
    """The model card: what a hub reads between the dashes, then words."""
    kind = told["export"]["kind"]
    title = {
        ADAPTER: f"{plan.name}: a LoRA adapter for {plan.model.path}",
        MERGED: f"{plan.name}: {plan.model.path} with a LoRA adapter merged into it",
        MODEL: f"{plan.name}: {plan.model.path} "
        + ("trained from scratch" if plan.model.from_scratch else "fine-tuned"),
    }[kind]
    return "\n".join(
        [
            *_front_matter(plan, kind),
            f"# {printable(title)}",
            "",
            *_use(plan, kind, speech),
            "",
            *_notes(plan, told, speech),
            "",
            "## How it was made",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {printable(str(value)).replace('|', chr(92) + '|')} |" for name, value in _rows(plan, told)),
            "",
            f"Made again by `{told['command']}`; every file's checksum is in `{FILE}`.",
            "",
        ]
    )


def _front_matter(plan: Plan, kind: str) -> list[str]:
    """Hub names only: a hub refuses a base or a data set that it does not know."""
    tags = ["hpcft", plan.train.objective, *(["lora"] if plan.tuner.kind == "lora" else [])]
    data = [s.path for s in (*plan.data.train, *plan.data.validation) if s.source == "huggingface"]
    lines = [
        f"library_name: {'peft' if kind == ADAPTER else 'transformers'}",
        f"pipeline_tag: text-{'classification' if plan.scored else 'generation'}",
        f"tags: {json.dumps(tags)}",
    ]
    if plan.model.source == "huggingface":
        lines += [f"base_model: {json.dumps(plan.model.path)}"]
        lines += [f"base_model_relation: {'adapter' if kind == ADAPTER else 'finetune'}"]
    if data:
        lines += [f"datasets: {json.dumps(list(dict.fromkeys(data)))}"]
    return ["---", *lines, "---", ""]


def _use(plan: Plan, kind: str, speech: Speech) -> list[str]:
    """A snippet that runs as it stands, in the folder's own directory."""
    if plan.scored:
        return _score(plan, kind, speech)
    trust = ", trust_remote_code=True" if plan.model.trust_remote_code else ""
    revision = f", revision={plan.model.revision!r}" if plan.model.revision else ""
    if kind == ADAPTER:
        dtype, config = "'auto'", ""
        if plan.model.quantization == "nf4":
            dtype, config = repr(plan.model.dtype), ", quantization_config=four_bits"
        load = [
            f"base = AutoModelForCausalLM.from_pretrained({plan.model.path!r}{revision}, dtype={dtype}{config}{trust})",
            "model = PeftModel.from_pretrained(base, folder)",
            "model.generation_config = GenerationConfig.from_pretrained(folder)",
        ]
        imports = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
        ]
        if config:
            load.insert(0, _four_bits(plan))
            imports[-1] = imports[-1].replace("AutoTokenizer, ", "AutoTokenizer, BitsAndBytesConfig, ")
    else:
        load = [f"model = AutoModelForCausalLM.from_pretrained(folder, dtype='auto'{trust})"]
        imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    ask = (
        [f"chat = [{_system(plan)}{{'role': 'user', 'content': 'Hello'}}]",
         "asked = dict(add_generation_prompt=True, return_tensors='pt', return_dict=True)",
         "inputs = tokenizer.apply_chat_template(chat, **asked)"]
        if speech.has_template
        else ["inputs = tokenizer('Once', return_tensors='pt')"]
    )  # fmt: skip
    return [
        "```python",
        *imports,
        "",
        'folder = "."  # this folder, or its name on the hub',
        *load,
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        *ask,
        "answer = model.generate(**inputs, max_new_tokens=200)[0, inputs['input_ids'].shape[1]:]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
        "```",
    ]


def _score(plan: Plan, kind: str, speech: Speech) -> list[str]:
    """The same for a model that scores: one chat, whose reward is a number, or one text and its class."""
    trust = ", trust_remote_code=True" if plan.model.trust_remote_code else ""
    revision = f", revision={plan.model.revision!r}" if plan.model.revision else ""
    imports = ["from transformers import AutoModelForSequenceClassification, AutoTokenizer"]
    load = [f"model = AutoModelForSequenceClassification.from_pretrained(folder, dtype='auto'{trust})"]
    if kind == ADAPTER:
        labels = f"id2label={dict(enumerate(plan.objective.labels))!r}" if plan.labelled else "num_labels=1"
        how = f"{labels}, pad_token_id={speech.padding}, dtype={plan.model.dtype!r}"
        if plan.model.quantization == "nf4":
            how += ", quantization_config=four_bits"
            imports = [imports[0].replace("AutoTokenizer", "AutoTokenizer, BitsAndBytesConfig")]
        base = f"base = AutoModelForSequenceClassification.from_pretrained({plan.model.path!r}{revision}, {how}{trust})"
        load = [base, "model = PeftModel.from_pretrained(base, folder)"]
        imports = ["from peft import PeftModel", *imports]
    four_bits = [_four_bits(plan, HEAD)] if "four_bits" in load[0] else []
    return [
        "```python",
        *imports,
        "",
        'folder = "."  # this folder, or its name on the hub',
        *four_bits,
        *load,
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        *(_classified(plan, speech) if plan.labelled else _scored_chat(plan, speech)),
        "```",
    ]


def _system(plan: Plan) -> str:
    """The turn that records without a system turn began with in training, as Python."""
    return f"{{'role': 'system', 'content': {plan.data.system!r}}}, " if plan.data.system else ""


def _classified(plan: Plan, speech: Speech) -> list[str]:
    """Lines that classify a text, and where there is a template a chat, each as training saw it."""
    text = "inputs = tokenizer('2 + 2 is 4.', return_tensors='pt')"
    chat = "inputs = tokenizer.apply_chat_template(chat, return_tensors='pt', return_dict=True)"
    lines = [f"{text}  # of records with `text`"]
    if speech.has_template:
        lines = [
            f"chat = [{_system(plan)}{{'role': 'user', 'content': '2 + 2 is 4.'}}]",
            f"{chat}  # of records with turns",
            f"# {lines[0]}",
        ]
    return [*lines, "scores = model.eval()(**inputs).logits[0]", "print(model.config.id2label[scores.argmax().item()])"]


def _scored_chat(plan: Plan, speech: Speech) -> list[str]:
    """Lines that score a chat as training saw it, to its last token."""
    show = "print(model.eval()(**inputs).logits.item())  # of two answers the better one has the higher reward"
    return [*_chat(plan, speech), show]


def _chat(plan: Plan, speech: Speech) -> list[str]:
    if not speech.has_template:
        return ["inputs = tokenizer('2 + 2? 4' + tokenizer.eos_token, return_tensors='pt')"]
    chat = f"chat = [{_system(plan)}{{'role': 'user', 'content': '2 + 2?'}}, {{'role': 'assistant', 'content': '4'}}]"
    if not speech.open:
        return [chat, "inputs = tokenizer.apply_chat_template(chat, return_tensors='pt', return_dict=True)"]
    return [
        chat,
        "text = tokenizer.apply_chat_template(chat, tokenize=False) + tokenizer.eos_token",
        "inputs = tokenizer(text, add_special_tokens=False, return_tensors='pt')",
    ]


def _four_bits(plan: Plan, *whole: str) -> str:
    """The base as it was in training. whole: modules that are not in 4 bits, which peft has trained in full."""
    skipped = f"llm_int8_skip_modules={[*whole]!r}, " if whole else ""
    return (
        f"four_bits = BitsAndBytesConfig(load_in_4bit=True, {skipped}bnb_4bit_quant_type='nf4', "
        f"bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype={plan.model.dtype!r})"
    )


def _notes(plan: Plan, told: Mapping[str, Any], speech: Speech) -> list[str]:
    """What a person who was given this folder has to know."""
    stops = ", ".join(f"`{text}`" for text in speech.stops) or "no token"
    notes = [f"Generation stops at {stops} (`generation_config.json`)."]
    if plan.scored:
        notes = _class_notes(plan, speech) if plan.labelled else _reward_notes(speech)
    if plan.model.source == "local" and told["export"]["kind"] == ADAPTER:
        notes.append(
            f"The base model is a local folder, `{printable(plan.model.path)}`, as seen from where the run was "
            "submitted. Elsewhere, give its place in the snippet and in `base_model_name_or_path` of "
            "`adapter_config.json`."
        )
    elif plan.model.source == "modelscope" and told["export"]["kind"] == ADAPTER:
        notes.append("The base model's name is ModelScope's: download it there and give its folder in the snippet.")
    if plan.data.system:
        notes.append(
            f"In training a chat without a system turn began with this one: {printable(plan.data.system, 1000)}"
        )
    if speech.dated:
        notes.append("The chat template writes today's date; in training it was the same fixed one in all rows.")
    if merge := told["merge"]:
        notes.append(
            f"Merged in float32, then cast to {told['export']['dtype']}: beside base and adapter kept apart, the "
            f"{_change(plan, merge)}."
        )
    if cost := told["quantised"]:
        notes.append(
            f"Trained on its base in {QUANTISED[plan.model.quantization]}. Beside the original base the "
            f"{_change(plan, cost)}."
        )
    return [f"- {note}" for note in notes]


def _class_notes(plan: Plan, speech: Speech) -> list[str]:
    names = plan.objective.labels
    shown = ", ".join(f"`{printable(name)}`" for name in names[:20]) + (" …" if len(names) > 20 else "")
    notes = [f"{len(names)} classes: {shown}. Their scores are those at the last token of a text."]
    if speech.padding is None:
        notes.append(NO_PADDING)
    return notes


def _reward_notes(speech: Speech) -> list[str]:
    ends = ", ".join(f"`{text}`" for text in speech.learned)
    notes = [
        "A reward is the score at the last token of the whole chat"
        + (f", whose last turn {ends} ends." if ends else ".")
    ]
    notes.append("Rewards are for comparing answers to the same prompt: their differences mean something, not they.")
    if speech.padding is None:
        notes.append(NO_PADDING)
    return notes


def _change(plan: Plan, change: Mapping[str, Any]) -> str:
    """How far the numbers moved that the model gives."""
    number = plan.number
    moved = f"largest {number} change is {change['largest']:.3g} (largest {number} {change['scale']:.3g})"
    if plan.scored:
        return moved
    same = f"{change['same']} of {change['positions']} positions tried"
    return f"{moved}, and the likeliest next token is the same at {same}"


def _rows(plan: Plan, told: Mapping[str, Any]) -> list[tuple[str, Any]]:
    training, losses, versions = told["training"], told["losses"], told["versions"]
    rows: list[tuple[str, Any]] = [
        ("base", plan.model.path + (f" at {plan.model.revision}" if plan.model.revision else "")),
        *(("data", _data_row(source)) for source in told["data"]["train"]),
        *(("validation data", _data_row(source)) for source in told["data"]["validation"]),
        ("objective", training["objective"]),
        ("tuning", _tuning(plan)),
        (
            "optimizer step",
            f"{told['export']['step']:,}" + (f" of {training['total_steps']:,}" if training["total_steps"] else ""),
        ),
    ]
    if training["epochs"] is not None:
        rows.append(("epochs", f"{training['epochs']:g}"))
    rows += [
        ("tokens", f"{training['tokens']:,}, {training['trained_tokens']:,} of them trained"),
        ("batch", f"{training['global_batch_windows']} windows of at most {training['max_length']} tokens"),
        ("learning rate", f"{training['learning_rate']:g}, {training['schedule']}"),
        ("precision", f"{_kept(plan)}, {training['compute']} compute; written as {told['export']['dtype']}"),
    ]
    names = {"loss": "training loss", "eval_loss": "evaluation loss", "best_eval_loss": "best evaluation loss"}
    rows += [
        (name, f"{losses[key]:.4f} at step {losses[f'{key}_step']:,}") for key, name in names.items() if key in losses
    ]
    rows += [
        ("plan", told["plan"]),
        ("prepared data", told["data"]["content"]),
        ("trained with", _software(versions["trained"])),
        ("exported with", _software(versions["exported"])),
    ]
    return rows


def _kept(plan: Plan) -> str:
    alone = plan.model.main_params_dtype == "bfloat16"
    return "weights and AdamW's moments in bfloat16" if alone else "float32 master weights"


def _data_row(source: Mapping[str, Any]) -> str:
    rows = f", {source['rows']:,} rows" if source["rows"] else ""
    return source["path"] + rows + (f" at {source['revision']}" if source["revision"] else "")


def _tuning(plan: Plan) -> str:
    tuner = plan.tuner
    if tuner.kind == "full":
        return "every weight"
    extras = [word for word, on in (("rsLoRA", tuner.use_rslora), ("DoRA", tuner.use_dora)) if on]
    extras += [f"trained in full: {', '.join(tuner.modules_to_save)}"] if tuner.modules_to_save else []
    extras += [f"base in {QUANTISED[plan.model.quantization]}"] if plan.model.quantization != "none" else []
    return f"LoRA, rank {tuner.rank}, alpha {tuner.alpha:g}, on {', '.join(tuner.target_modules)}" + "".join(
        f"; {extra}" for extra in extras
    )


def _software(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if name != "written")
