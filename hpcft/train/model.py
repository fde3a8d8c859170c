"""The model, from its folder to the form a strategy takes: built empty, adapted, cut, told to recompute.

Read ``prepare_model`` top down: the order of the calls is the order of what happens to the model.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from hpcft.errors import Problem, Refusal, refuse
from hpcft.plan.basefiles import lacking, unusable
from hpcft.plan.plan import QUANTISED, ModelPlan, Plan
from hpcft.run.regions import Span
from hpcft.train.adapters import FROM_WEIGHTS, add_adapters, is_adapter, refuse_unmatched
from hpcft.train.attention import VARLEN, choose_attention, for_any_shape, register_varlen
from hpcft.train.parameters import ghosts, without_memory
from hpcft.train.precision import DTYPES
from hpcft.train.quantise import quantise
from hpcft.train.recorded import recorded
from hpcft.train.rotary import pin_factors
from hpcft.train.score import (
    HEAD,
    auto_class,
    check_decoder,
    check_family,
    check_head,
    fresh,
    said_of_scores,
)
from hpcft.train.shared_inputs import share_inputs, shares_inputs
from hpcft.train.skeleton import Skeleton, beyond_text, let_in
from hpcft.train.sources import Files, FirstRank, Source, files_of, fits
from hpcft.train.tensor_parallel import cut
from hpcft.train.world import World


def prepare_model(plan: Plan, world: World, notes: Path | None = None) -> Skeleton:
    """A transformers model, or a peft model of one, without its weights; the same on every rank but for its cut.

    notes: recorded.json of the run, where what was found out about the device is kept for later attempts.

    Full tuning: every weight in the masters' type, so that they lose nothing. LoRA: adapters float32, the frozen base
    in the compute type or, for QLoRA, in 4 bits. The strategy reads what a rank keeps and makes it trainable.
    """
    config = own_config(plan)
    if (folder := folder_of(plan.model)).is_dir() and (problems := unusable(folder, plan)):
        raise Refusal(problems)
    attention = _agreed_attention(plan, config, world, notes)
    model = empty_model(plan, config, attention)
    source = find_source(plan, config, attention, model, world)
    _refuse_strangers(world.gather_text(source.mark()))
    if plan.tuner.kind == "lora":
        refuse_unmatched(model, plan.tuner)
        # Ghosts have nothing that adapters could be taken out of; then the whole model on rank 0 has done it.
        tuner = plan.tuner if isinstance(source, Files) else dataclasses.replace(plan.tuner, init_lora_weights="true")
        model = add_adapters(model, tuner, plan.train.seed)
        if isinstance(source, Files):
            source.initial |= {n: p.detach().clone() for n, p in model.named_parameters() if is_adapter(n)}
        without_memory(model)
    read_buffers(model, source)
    pin_factors(model, plan.data.max_length, world.first)
    skeleton = Skeleton(model, source, {name: tuple(p.shape) for name, p in model.named_parameters()})
    if unread := beyond_text(model):
        skeleton.unread = unread
        _say_unread(skeleton, world)
    if plan.model.quantization != "none":
        skeleton.packs = quantise(model, plan.model.quantization, DTYPES[plan.model.dtype], world.device)
        _say_quantised(skeleton, plan.model, world)
    if plan.layout.degree("tp") > 1:
        skeleton.regions = cut(model, world.group("tp"))
    recompute(model, plan.train.recomputation)
    if shares_inputs(plan):
        share_inputs(model)
    model.train()
    let_in(model)
    return skeleton


def weights_dtype(plan: Plan) -> torch.dtype:
    """Of the base as it is read: the masters' type when it is trained whole, else the compute type."""
    return DTYPES[plan.model.main_params_dtype if plan.tuner.kind == "full" else plan.model.dtype]


def load_config(plan: ModelPlan) -> Any:
    """The model's configuration, with the cache off: with it on, packed documents see each other."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            local_folder(plan), revision=plan.revision, local_files_only=True, trust_remote_code=plan.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise refuse(
            f"model: the model's configuration cannot be read: {str(error).splitlines()[0]}",
            value=plan.path,
            hint="ranks run offline; submit downloads a hub name first, a folder must hold config.json",
        ) from error
    config.use_cache = False
    return config


def own_config(plan: Plan) -> Any:
    """The same for what the run's objective asks of the model."""
    config = load_config(plan.model)
    check_family(config, plan) if plan.scored else check_decoder(config, plan)
    for key, value in said_of_scores(plan).items():
        setattr(config, key, value)
    return config


def local_folder(plan: ModelPlan) -> str:
    """Where the files are: the folder itself, or the hub name, which the hub's cache resolves offline."""
    if plan.source != "modelscope" or Path(plan.path).is_dir():
        return plan.path
    from modelscope import snapshot_download

    return str(snapshot_download(plan.path, revision=plan.revision, local_files_only=True))


def load_model(plan: Plan, config: Any, attention: str, device: torch.device) -> nn.Module:
    """The base model on ``device``, in its weights' type."""
    dtype = weights_dtype(plan)
    if attention.startswith(VARLEN):
        register_varlen(attention)
    trust = plan.model.trust_remote_code
    torch.manual_seed(plan.train.seed)  # of all weights, or of those that the files do not have
    if plan.model.from_scratch:
        model = auto_class(plan).from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust
        )
    else:
        with unreadable_model(plan):
            model, found = auto_class(plan).from_pretrained(
                local_folder(plan.model),
                config=config,
                revision=plan.model.revision,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=trust,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused by name, instead of by a table in the log
            )
        refuse_random(model, found, plan)
    model.config.use_cache = False
    return model.to(device)


def empty_model(plan: Plan, config: Any, attention: str) -> nn.Module:
    """The base model without weights; for adapters, which are made real, as ghosts of them."""
    from accelerate import init_empty_weights

    if attention.startswith(VARLEN):
        register_varlen(attention)
    dtype = weights_dtype(plan)
    with unreadable_model(plan), init_empty_weights(include_buffers=False):
        model = auto_class(plan).from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=plan.model.trust_remote_code
        )
    if plan.scored:
        check_head(model)
    model.tie_weights()
    model.config.use_cache = False
    if plan.tuner.kind == "lora":
        ghosts(model)
    return model


def find_source(plan: Plan, config: Any, attention: str, model: nn.Module, world: World) -> Source:
    """The model's files, or a whole model on rank 0 where only that has the numbers: see ``sources``."""
    own_start = plan.tuner.kind == "full" or (
        not plan.tuner.use_dora and not plan.tuner.init_lora_weights.startswith(FROM_WEIGHTS)
    )
    files = files_of(folder_of(plan.model))
    new = {SCORE: fresh(config, plan.train.seed)} if plan.scored and SCORE not in files else {}
    tensors = (*model.named_parameters(), *saved_buffers(model).items())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors if name not in new}
    if own_start and not plan.model.from_scratch and fits(files, shapes):
        return Files(files, new)

    def whole() -> nn.Module:
        made = load_model(plan, config, attention, torch.device("cpu"))
        return made if plan.tuner.kind == "full" else add_adapters(made, plan.tuner, plan.train.seed)

    return FirstRank(world, whole)


def refuse_random(model: nn.Module, found: Mapping[str, Any], plan: Plan) -> None:
    """Raises Refusal for parameters that the files do not have, or have in another shape: they would be random.

    found: what transformers tells of the loading. A new head of scores is meant to be.
    """
    own = {name for name, _ in model.named_parameters()} - ({SCORE} if plan.scored else set())
    problems = [lacking(random)] if (random := own & set(found["missing_keys"])) else []
    if other := sorted((name, there, here) for name, there, here in found["mismatched_keys"] if name in own):
        name, there, here = other[0]
        problems.append(
            Problem(
                f"model: {len(other)} tensors of its files have another shape than config.json gives them",
                value=f"{name}: {tuple(there)} in the files, {tuple(here)} by config.json",
                hint="do weights and config.json come from the same model?",
            )
        )
    if problems:
        raise Refusal([dataclasses.replace(problem, where=plan.model.path) for problem in problems])


@contextmanager
def unreadable_model(plan: Plan) -> Iterator[None]:
    """What transformers refuses, and would refuse again, is a Refusal; not what a file system may mend."""
    try:
        yield
    except (ImportError, ValueError, SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EACCES, errno.EPERM):
            raise
        asked = plan.model.attention != "auto" and "attention" in str(error).lower()
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise refuse(
            f"model: transformers cannot build it: {words}",
            value=plan.model.path,
            hint="attn_impl: auto takes what runs here" if asked else "see the model's page for what it needs",
        ) from error


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are part of a model's state, such as a router's bias; others its configuration gives."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def read_buffers(model: nn.Module, source: Source) -> None:
    """Their numbers, on every rank."""
    for name, buffer in saved_buffers(model).items():
        shape = tuple(buffer.shape)
        numbers = torch.empty(buffer.numel(), dtype=buffer.dtype)
        source.read(name, Span(shape, None, 0, buffer.numel()), numbers)
        buffer.copy_(numbers.view(shape))


def folder_of(plan: ModelPlan) -> Path:
    """The folder with the model's files, of a hub model in the cache; one that does not exist where it is not there."""
    folder = Path(local_folder(plan))
    return folder if folder.is_dir() else _cached(plan)


def _cached(plan: ModelPlan) -> Path:
    """The folder of a hub model in the cache; one that does not exist where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(plan.path, "config.json", revision=plan.revision)
    return Path(found).parent if isinstance(found, str) else Path("not-in-the-cache")


def recompute(model: nn.Module, policy: str) -> None:
    """none: keep all activations; full: every decoder layer again in the backward pass; selective: every other one."""
    if policy == "none":
        return
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.2x on
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if policy == "selective":
        layers = [m for m in model.modules() if isinstance(getattr(m, "gradient_checkpointing", None), bool)]
        leaves = [m for m in layers if not any(n is not m and n in layers for n in m.modules())]
        for layer in leaves[1::2]:
            setattr(layer, "gradient_checkpointing", False)  # noqa: B010  a flag of transformers, unknown to nn.Module


def _say_unread(skeleton: Skeleton, world: World) -> None:
    """How much of the model is for images and sounds, which are not trained."""
    if world.first:
        numbers = sum(math.prod(skeleton.shapes[name]) for name in skeleton.unread)
        print(f"model: {numbers:,} of its weights are not for text and stay as they are", file=sys.stderr)


def _say_quantised(skeleton: Skeleton, model: ModelPlan, world: World) -> None:
    """How much of the base it is: a mixture of experts keeps most of its weights in tensors that are no linears."""
    frozen = skeleton.shapes.keys() - skeleton.trained.keys()
    packed, whole = (sum(math.prod(skeleton.shapes[n]) for n in names) for names in (skeleton.packs, frozen))
    if world.first:
        said = QUANTISED[model.quantization]
        print(f"base: {packed:,} of {whole:,} weights in {said}, the others in {model.dtype}", file=sys.stderr)


DIGESTED = 2**24  # numbers at a time: in float64 they take eight bytes each
SCORE = f"{HEAD}.weight"


def check_same(model: nn.Module, world: World) -> None:
    """Every rank must start from the same weights. Raises Refusal naming the ranks that differ from rank 0."""
    if world.size == 1:
        return
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        # As integers: the bytes of a quantised weight may spell what is no number.
        bits = parameter.detach().view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
        sums = torch.zeros(2, dtype=torch.float64, device=bits.device)
        for part in bits.flatten().split(DIGESTED):
            sums += torch.stack([part.double().sum(), part.double().square().sum()])
        digest.update(f"{name} {sums.tolist()!r}\n".encode())
    _refuse_strangers(world.gather_text(digest.hexdigest()))


def _refuse_strangers(marks: Sequence[str]) -> None:
    if strangers := [rank for rank, mark in enumerate(marks) if mark != marks[0]]:
        raise refuse(
            f"rank{'s' * (len(strangers) > 1)} {', '.join(map(str, strangers))} loaded other weights than rank 0",
            hint="is the model's folder the same on every node, and is the software?",
        )


def _agreed_attention(plan: Plan, config: Any, world: World, notes: Path | None) -> str:
    """What rank 0 found to run, said once in its log."""

    def choose() -> str:
        return choose_attention(plan.model.attention, config, DTYPES[plan.model.dtype], world.device)

    chosen = ""
    if world.first:
        chosen = recorded(notes, "attention", world.device, choose) if notes else choose()
    chosen = world.broadcast_text(chosen)
    if not plan.train.compiled:
        chosen = for_any_shape(chosen)
    if world.first:
        print(
            f"attention: {chosen}"
            + ("" if plan.model.attention == chosen else f" (asked for: {plan.model.attention})"),
            file=sys.stderr,
        )
    return chosen
