"""Trained weights out of a checkpoint into a Hugging Face folder, and read back by plain transformers and peft.

Three forms: an adapter, a whole model, an adapter merged into its base. Each writer fills a model with the checkpoint's
float32 masters, asks it for logits, writes it, loads what it wrote as a stranger would, and compares. Memory: one
model in the type it is written in; merging holds one in float32.
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
from hpcft.train.checkpoint import Reader
from hpcft.train.model import add_adapters, load_config, load_model, local_folder
from hpcft.train.precision import DTYPES

CPU = torch.device("cpu")
SHARD = "4GB"  # a file's size; hubs and people's connections like it
ADAPTER = "adapter_model.safetensors"
# Inits that take a part out of the base weights: their adapter means nothing beside the original base.
MUTATING = ("pissa", "olora")
EXACT = 1e-5  # share of the largest logit that float32 sums may differ by when they are added in another order
WRONG = 1e-3  # … and from which on a merge is not rounding but a mistake

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
    """What a writer wrote. reloaded: of the folder against the trained model; merged: of merging, in the written
    type; rounding: what that type alone can do to a weight, as a share of it."""

    parameters: int
    reloaded: Change
    merged: Change | None = None
    rounding: float = 0.0
    warnings: tuple[str, ...] = ()


def write_adapter(plan: Plan, reader: Reader, folder: Path, dtype: torch.dtype, samples: Samples) -> Written:
    """adapter_model.safetensors and adapter_config.json as peft writes them. Raises Unfaithful."""
    compute = DTYPES[plan.model.dtype]
    model = add_adapters(original(plan, compute), plan.tuner, plan.train.seed)
    initial = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n} if _mutates(plan) else {}
    masters = {name: tensor.to(dtype) for name, tensor in masters_of(reader)}
    fill(model, masters.items(), reader)
    trained = logits(model, samples)
    tensors = _adapter_tensors(model, {**masters, **_subtracted(masters, initial)})
    warnings = check_adapter(tensors)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    adapter_config(plan, model).save_pretrained(folder)
    del model, masters
    change = compare(trained, logits(_reloaded_adapter(plan, compute, folder, tensors), samples))
    # Where a part was taken out of rounded base weights, putting it back differs by that rounding.
    _faithful(change, max(EXACT, 32 * torch.finfo(compute).eps) if initial else EXACT)
    return Written(sum(tensor.numel() for tensor in tensors.values()), change, warnings=warnings)


def write_model(plan: Plan, reader: Reader, folder: Path, dtype: torch.dtype, samples: Samples) -> Written:
    """A whole model, sharded, with its configuration; one copy of it in ``dtype`` is held. Raises Unfaithful."""
    model = original(plan, dtype)
    fill(model, masters_of(reader), reader)
    trained = logits(model, samples)
    parameters = save_model(model, folder)
    del model
    change = compare(trained, logits(_reloaded_model(plan, dtype, folder), samples))
    _faithful(change, EXACT)
    return Written(parameters, change)


def write_merged(plan: Plan, reader: Reader, folder: Path, dtype: torch.dtype, samples: Samples) -> Written:
    """The adapter merged into the original base in float32, then cast; the base is never a quantised or rounded one.

    Raises Unfaithful where merging moves the logits by more than the order of float32 sums, before any cast.
    """
    model = add_adapters(original(plan, torch.float32), plan.tuner, plan.train.seed)
    fill(model, masters_of(reader), reader)
    trained = logits(model, samples)
    whole = merge(model)
    exact = compare(trained, logits(whole, samples))
    if not exact.share < WRONG:
        raise Unfaithful(
            f"merging in float32 moved a logit by {exact.largest:.3g} of {exact.scale:.3g}: more than rounding explains"
        )
    _round(whole, dtype)
    cast = logits(whole, samples)
    change = compare(trained, cast)
    parameters = save_model(whole.to(dtype), folder)
    del model, whole
    again = compare(cast, logits(_reloaded_model(plan, torch.float32, folder), samples))
    _faithful(again, EXACT)
    return Written(parameters, again, change, torch.finfo(dtype).eps / 2, _merge_warnings(change, dtype))


def original(plan: Plan, dtype: torch.dtype) -> Any:
    """The base model as the run began with it, in ``dtype`` on the CPU. Raises Refusal where it cannot be read."""
    if plan.model.from_scratch:
        config = load_config(plan.model)
        model = load_model(plan, config, "eager" if plan.model.attention == "eager" else "sdpa", CPU).to(dtype)
        model.config.use_cache = True
        return model
    return _pretrained(plan, local_folder(plan.model), dtype)


def _pretrained(plan: Plan, folder: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    revision = plan.model.revision if folder == plan.model.path else None
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            revision=revision,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=plan.model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise refuse(
            f"model.path: the base model cannot be read: {str(error).splitlines()[0]}",
            value=plan.model.path,
            hint="paths of the plan are relative to the directory the run was submitted from: type this there",
        ) from error


def masters_of(reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor) of every trained parameter, one at a time."""
    for name, shape in reader.names().items():
        yield name, reader.read(name, "master", 0, math.prod(shape)).view(shape)


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], reader: Reader) -> None:
    """Copy the checkpoint into the model's trainable parameters. Raises Refusal where the two do not match."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    then, now = reader.names(), {name: tuple(p.shape) for name, p in parameters.items()}
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            there, here = then.get(name, "not there"), now.get(name, "not there")
            raise refuse(
                f"{name} is {there} in the checkpoint and {here} in the model",
                where=str(reader.folder),
                hint="has the model's folder, or peft, changed since the run began?",
            )
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise refuse(
                f"{name} holds numbers that are not finite",
                where=str(reader.folder),
                value=str(tensor.dtype).removeprefix("torch."),
                hint="an earlier checkpoint, or another --dtype, may do",
            )
        parameters[name].copy_(tensor)


@torch.no_grad()
def logits(model: nn.Module, samples: Samples) -> list[torch.Tensor]:
    """float32 [tokens, vocabulary] of each sample, as the model is used: no dropout, no cache."""
    model.eval()
    return [model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float() for ids in samples]


def compare(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> Change:
    """Logits of the same samples twice. Anything that is no number makes the largest difference infinite."""
    pairs = list(zip(before, after, strict=True))
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    finite = all(bool(torch.isfinite(a).all() and torch.isfinite(b).all()) for a, b in pairs)
    return Change(
        largest if finite else math.inf,
        max(float(a.abs().max()) for a, _ in pairs),
        sum(len(a) for a, _ in pairs),
        sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs),
    )


def merge(model: Any) -> Any:
    """The base model with the adapter inside its weights.

    Embedding and head that share one tensor part ways where only one of them was trained: merged into the shared
    tensor, the change would reach the other one too.
    """
    inner = model.get_base_model()
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    shared = head is not None and _plain(head).weight is _plain(embedding).weight
    if shared and (_plain(head) is not head or _plain(embedding) is not embedding):
        _plain(head).weight = nn.Parameter(_plain(head).weight.detach().clone())
    whole = model.merge_and_unload(safe_merge=True)
    if shared:
        _share_again(whole)
    return whole


def _share_again(whole: Any) -> None:
    """Embedding and head are one tensor where they are still equal; else the configuration says that they are two."""
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight
        return
    for config in (whole.config, whole.config.get_text_config()):
        config.tie_word_embeddings = False


def _plain(layer: Any) -> Any:
    """The layer itself, without what peft wrapped around it."""
    for name in ("base_layer", "original_module"):
        layer = getattr(layer, name, layer)
    return layer


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Every weight to the nearest number that ``dtype`` has, kept in float32: so the cast is measured, nothing else."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def save_model(model: Any, folder: Path) -> int:
    """Weights in shards and the configuration; how many weights. The generation configuration is written elsewhere."""
    from transformers import GenerationConfig

    parameters = sum(p.numel() for p in model.parameters())
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, max_shard_size=SHARD)
    return parameters


def _reloaded_model(plan: Plan, dtype: torch.dtype, folder: Path) -> Any:
    try:
        return _pretrained(plan, str(folder), dtype)
    except Exception as error:
        raise Unfaithful(f"the written folder does not load: {error}") from error


def _reloaded_adapter(plan: Plan, compute: torch.dtype, folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    """Base and adapter as peft loads them; every tensor in its place."""
    from peft import PeftModel, get_peft_model_state_dict

    stored = load_file(folder / ADAPTER)
    model = PeftModel.from_pretrained(original(plan, compute), str(folder))
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(tensors.keys() | stored.keys() | loaded.keys()):
        if not all(name in found for found in (tensors, stored, loaded)):
            raise Unfaithful(f"{name} got lost on the way into the adapter or out of it")
        if not torch.equal(stored[name].to(loaded[name].dtype), loaded[name]):
            raise Unfaithful(f"{name} is not what was written once peft has loaded it")
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
    if _mutates(plan):
        config.init_lora_weights = True
        config.r *= 2
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    return config


def _faithful(change: Change, allowed: float) -> None:
    if not change.share <= allowed:
        raise Unfaithful(
            f"loaded back, the folder's largest logit differs by {change.largest:.3g} (of {change.scale:.3g}) "
            "from the trained model's"
        )


def _merge_warnings(change: Change, dtype: torch.dtype) -> tuple[str, ...]:
    """Rounded weights move logits by some multiple of their rounding; far beyond that the type is too coarse."""
    name = str(dtype).removeprefix("torch.")
    if not math.isfinite(change.largest):
        raise Unfaithful(f"the merged weights do not fit into {name}: logits are no numbers; use --dtype float32")
    if change.share <= 16 * torch.finfo(dtype).eps + EXACT:
        return ()
    return (
        f"casting the merged weights to {name} moves a logit by {change.largest:.3g} of {change.scale:.3g}, more than "
        "is usual for this type; --dtype float32 keeps the trained model",
    )
