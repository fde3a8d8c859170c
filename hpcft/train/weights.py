"""Trained weights out of a checkpoint into a Hugging Face folder, and read back by plain transformers and peft.

Each writer fills a model with the checkpoint's float32 masters, asks it for logits, writes it, loads what it wrote as
a stranger would, and compares. One copy of the model is held at a time, in the type it is written in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hpcft.errors import refuse
from hpcft.plan.plan import Plan
from hpcft.train.adapters import add_adapters
from hpcft.train.facts import same_tensors
from hpcft.train.model import load_model, local_folder, own_config
from hpcft.train.precision import DTYPES
from hpcft.train.quantise import quantise_now
from hpcft.train.reader import Reader
from hpcft.train.score import auto_class, head_of_score, said_of_scores

CPU = torch.device("cpu")
SHARD = "4GB"  # a file's size; hubs and people's connections like it
ADAPTER = "adapter_model.safetensors"
# Inits that take a part out of the base weights: their adapter means nothing beside the original base.
MUTATING = ("pissa", "olora")
EXACT = 1e-5  # share of the largest logit that float32 sums may differ by when they are added in another order

Samples = Sequence[Sequence[int]]


class Unfaithful(Exception):
    """What was written is not what was trained; nothing is published."""


@dataclass(frozen=True)
class Change:
    """How far logits moved, over ``positions`` tokens. scale: the largest logit; same: positions whose likeliest
    next token is still the same one."""

    largest: float
    scale: float
    positions: int
    same: int

    @property
    def share(self) -> float:
        """Of the largest logit; infinite where a logit is no number."""
        return self.largest / max(self.scale, 1e-30) if math.isfinite(self.largest) else math.inf


@dataclass(frozen=True)
class Written:
    """What a writer wrote. reloaded: the folder against the trained model; merged: the merged model, in the type it is
    written in, against base and adapter apart; quantised: the adapter beside the quantised base that it was trained on
    against the same beside the original, which is what quantisation costs."""

    parameters: int
    reloaded: Change
    merged: Change | None = None
    quantised: Change | None = None
    warnings: tuple[str, ...] = ()


def write_adapter(plan: Plan, reader: Reader, folder: Path, dtype: torch.dtype, samples: Samples) -> Written:
    """adapter_model.safetensors and adapter_config.json as peft writes them. Raises Unfaithful."""
    compute = DTYPES[plan.model.dtype]
    model = adapted(plan, compute)
    initial = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n} if _mutates(plan) else {}
    masters = {name: tensor.to(dtype) for name, tensor in masters_of(reader)}
    fill(model, masters.items(), reader)
    beside_original = trained = logits(model, samples)
    if is_quantised(plan):
        quantise_now(model, plan.model.quantization, compute)
        trained = logits(model, samples)
    tensors = _adapter_tensors(model, {**masters, **_subtracted(masters, initial)})
    warnings = check_adapter(tensors)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    adapter_config(plan, model).save_pretrained(folder)
    del model, masters
    change = compare(trained, logits(_reloaded_adapter(plan, compute, folder, tensors), samples))
    faithful(change, EXACT + 8 * torch.finfo(compute).eps if initial else EXACT)
    if change.share > EXACT:
        warnings += (
            f"{plan.tuner.init_lora_weights} took a part out of base weights that were then rounded to "
            f"{plan.model.dtype}; beside the original base logits differ by {change.largest:.2g} of {change.scale:.3g}",
        )
    quantised = compare(beside_original, trained) if is_quantised(plan) else None
    return Written(sum(t.numel() for t in tensors.values()), change, quantised=quantised, warnings=warnings)


def write_model(
    plan: Plan, reader: Reader, folder: Path, dtype: torch.dtype, samples: Samples, padding: int | None = None
) -> Written:
    """A whole model, sharded, with its configuration; one copy of it in ``dtype`` is held. Raises Unfaithful."""
    model = original(plan, dtype)
    fill(model, masters_of(reader), reader)
    trained = logits(model, samples)
    parameters = save_model(model, folder, padding)
    del model
    change = compare(trained, logits(reloaded_model(plan, dtype, folder), samples))
    faithful(change, EXACT)
    return Written(parameters, change)


def memory(plan: Plan, dtype: torch.dtype) -> int:
    """Bytes of the base model in ``dtype``, from its configuration alone."""
    with torch.device("meta"):
        model = auto_class(plan).from_config(
            own_config(plan), dtype=dtype, trust_remote_code=plan.model.trust_remote_code
        )
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def original(plan: Plan, dtype: torch.dtype) -> Any:
    """The base model as the run began with it, in ``dtype`` on the CPU. Raises Refusal where it cannot be read."""
    if plan.model.from_scratch:
        config = own_config(plan)
        model = load_model(plan, config, "eager" if plan.model.attention == "eager" else "sdpa", CPU)
        for parameter in model.parameters():  # not the buffers: rotations of rounded frequencies are others
            parameter.data = parameter.data.to(dtype)
        model.config.use_cache = True
        return model
    return _pretrained(plan, local_folder(plan.model), dtype)


def _pretrained(plan: Plan, folder: str, dtype: torch.dtype) -> Any:
    revision = plan.model.revision if folder == plan.model.path else None
    # What was written says so itself; only then does loading it show what a stranger gets.
    said = said_of_scores(plan) if folder == local_folder(plan.model) else {}
    try:
        return auto_class(plan).from_pretrained(
            folder,
            revision=revision,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=plan.model.trust_remote_code,
            **said,
        )
    except (OSError, ValueError) as error:
        raise refuse(
            f"model: the base model cannot be read: {str(error).splitlines()[0]}",
            value=plan.model.path,
            hint="paths of the plan are relative to the directory the run was submitted from: type this there",
        ) from error


def adapted(plan: Plan, dtype: torch.dtype) -> Any:
    """The original base in ``dtype`` with the run's adapters, untrained."""
    return add_adapters(original(plan, dtype), plan.tuner, plan.train.seed)


def is_quantised(plan: Plan) -> bool:
    """Was the adapter trained on a base in fewer bits?"""
    return plan.model.quantization != "none"


def masters_of(reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor) of every trained parameter, one at a time."""
    for name, shape in reader.names().items():
        yield name, reader.read(name, "master", 0, math.prod(shape)).view(shape)


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], reader: Reader) -> None:
    """Copy the checkpoint into the model's trainable parameters. Raises Refusal where the two do not match."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    same_tensors(reader.manifest, {name: tuple(p.shape) for name, p in parameters.items()})
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise refuse(
                f"{name} holds numbers that are not finite",
                where=str(reader.folder),
                value=str(tensor.dtype).removeprefix("torch."),
                hint="an earlier checkpoint, or another --dtype, may do",
            )
        # A new tensor, as in training: peft lets some parameters share memory that were trained apart.
        parameters[name].data = tensor.to(parameters[name].dtype)


@torch.no_grad()
def logits(model: nn.Module, samples: Samples) -> list[torch.Tensor]:
    """float32 [tokens, vocabulary] of each sample, or [1, scores] of its text, as it is used: no dropout."""
    model.eval()
    found = [model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float() for ids in samples]
    return [torch.atleast_2d(numbers) for numbers in found]


def compare(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> Change:
    """Logits of the same samples twice. Anything that is no number makes the largest difference infinite.

    Scores below 1 are compared with 1: differences of them are used, in exponentials, and they may well be near 0.
    """
    pairs = list(zip(before, after, strict=True))
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    finite = all(bool(torch.isfinite(a).all() and torch.isfinite(b).all()) for a, b in pairs)
    return Change(
        largest if finite else math.inf,
        max([float(a.abs().max()) for a, _ in pairs] + [1.0] * (len(pairs[0][0]) == 1)),
        sum(len(a) for a, _ in pairs),
        sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
    )


def save_model(model: Any, folder: Path, padding: int | None = None) -> int:
    """Weights in shards and the configuration; how many weights. The generation configuration is written elsewhere.

    padding: what a model that scores takes for padding, and so not for the end of a text.
    """
    from transformers import GenerationConfig

    parameters = sum(p.numel() for p in model.parameters())
    if head_of_score(model) is None:
        model.generation_config = GenerationConfig()
    else:
        model.config.pad_token_id = padding
    model.save_pretrained(folder, max_shard_size=SHARD)
    return parameters


def reloaded_model(plan: Plan, dtype: torch.dtype, folder: Path) -> Any:
    try:
        return _pretrained(plan, str(folder), dtype)
    except Exception as error:
        raise Unfaithful(f"the written folder does not load: {error}") from error


def _reloaded_adapter(plan: Plan, compute: torch.dtype, folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    """Base and adapter as peft loads them, the base quantised where it was in training; every tensor in its place."""
    from peft import PeftModel, get_peft_model_state_dict

    stored = load_file(folder / ADAPTER)
    # Trainable, or what was trained whole would be taken for a part of the frozen base, and quantised.
    model = PeftModel.from_pretrained(original(plan, compute), str(folder), is_trainable=True)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(tensors.keys() | stored.keys() | loaded.keys()):
        if not all(name in found for found in (tensors, stored, loaded)):
            raise Unfaithful(f"{name} got lost on the way into the adapter or out of it")
        if not torch.equal(stored[name].to(loaded[name].dtype), loaded[name]):
            raise Unfaithful(f"{name} is not what was written once peft has loaded it")
    if is_quantised(plan):
        quantise_now(model, plan.model.quantization, compute)
    return model


def _adapter_tensors(model: Any, masters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """peft's names for the file → tensors of their own, in memory order.

    A parameter that two modules share has one name in the checkpoint and two in the file.
    """
    from peft import get_peft_model_state_dict

    first = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = {n: masters.get(first[id(p)]) for n, p in model.named_parameters(remove_duplicate=False)}
    tensors = {name: tensor for name, tensor in shared.items() if tensor is not None}
    named = get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in sorted(named.items())}


def _mutates(plan: Plan) -> bool:
    return plan.tuner.init_lora_weights.startswith(MUTATING)


def _subtracted(masters: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained product minus the initial one, as one adapter of twice the rank: [A; A₀] and [B, −B₀]."""
    joined = {}
    for name, start in initial.items():
        now = masters[name]
        if "lora_A" in name:
            joined[name] = torch.cat([now, start.to(now.dtype)], dim=0)
        elif "lora_B" in name:
            joined[name] = torch.cat([now, -start.to(now.dtype)], dim=1)
    return joined


def check_adapter(tensors: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """Warnings about an adapter that does less than it seems. Raises Unfaithful where a tensor is empty."""
    if empty := [name for name, tensor in tensors.items() if not tensor.numel()]:
        raise Unfaithful(f"{len(empty)} tensors of the adapter are empty, {empty[0]} among them")
    if not tensors:
        raise Unfaithful("the adapter holds no tensor at all")
    second = [name for name in tensors if "lora_B" in name or "lora_embedding_B" in name]
    still = [name for name in second if not tensors[name].any()]
    if not still:
        return ()
    return (f"{len(still)} of {len(second)} lora_B are all zeros, {still[0]} among them: there nothing was learned",)


def adapter_config(plan: Plan, model: Any) -> Any:
    """peft's configuration, naming the base as the plan does."""
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path, config.revision = plan.model.path, plan.model.revision
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    if getattr(config, "ensure_weight_tying", False) and any(
        "lora_embedding_A" in n for n, _ in model.named_parameters()
    ):
        # The two adapters of a shared embedding were trained apart; loaded as one, the second would replace the first.
        config.ensure_weight_tying = False
        config.target_modules = sorted({*config.target_modules, "embed_tokens", "lm_head"})
    if _mutates(plan):
        config.init_lora_weights = True
        config.r *= 2
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    return config


def faithful(change: Change, allowed: float) -> None:
    if not change.share <= allowed:
        raise Unfaithful(
            f"loaded back, the folder's largest logit differs by {change.largest:.3g} (of {change.scale:.3g}) "
            "from the trained model's"
        )
