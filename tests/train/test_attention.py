"""Which attention a model gets, and that the kernel for packed rows computes what the model asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import transformers
from transformers import AutoModelForCausalLM

from hpcft.errors import Refusal
from hpcft.train import attention
from hpcft.train.miniature import stir
from tests.train import families

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
SLIDING = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
DEEPSEEK = {**LATENT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

# name → configuration class and what is particular about it
FITTING: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "gemma3": ("Gemma3TextConfig", SLIDING),
    "latent attention": ("DeepseekV3Config", DEEPSEEK),
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "soft caps": ("Gemma2Config", {"head_dim": 16}),
    "sinks": ("GptOssConfig", {"head_dim": 16}),
    "sinks of another family": ("MiMoV2FlashConfig", {"head_dim": 16}),
    "dropout": ("LlamaConfig", {"attention_dropout": 0.1}),
    "dropout by another name": ("GPT2Config", {"attn_pdrop": 0.1}),
    "chunks": ("Llama4TextConfig", {"head_dim": 16, "attention_chunk_size": 8}),
    "tokens that an index chooses": ("DeepseekV32Config", {**DEEPSEEK, "index_topk": 8}),
    "heads of another width in some layers": ("Gemma4TextConfig", {"head_dim": 256, "global_head_dim": 512}),
    "wide heads": ("GemmaConfig", {"head_dim": 512}),
    "a look ahead": ("Gemma3TextConfig", {**SLIDING, "use_bidirectional_attention": True}),
}


def configuration(kind: str, particular: dict[str, Any]) -> Any:
    return getattr(transformers, kind)(**{**families.SIZES, **TOKENS, **particular})


def chosen(config: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a GPU on which the kernel runs."""
    monkeypatch.setattr(attention, "_fastest", lambda config, dtype, device: attention.VARLEN)
    return attention.choose_attention("auto", config, torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("name", FITTING)
def test_a_model_that_the_kernel_for_packed_rows_can_serve_gets_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(configuration(*FITTING[name]), monkeypatch) == attention.VARLEN


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_asks_for_what_the_kernel_cannot_be_told_keeps_another(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(configuration(*OTHERS[name]), monkeypatch) in ("sdpa", "eager")


def document_by_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, *_: Any, **options: Any
) -> torch.Tensor:
    """What torch's ``varlen_attn`` computes, on a CPU. query: [tokens, heads, width]; like it, of one width."""
    assert query.shape == key.shape == value.shape
    parts, (left, _) = [], options["window_size"]
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & (back <= left) if left >= 0 else back >= 0
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=options["scale"])
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> str:
    """The attention's name; a stand-in takes the place of torch's kernel, which wants a GPU."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", document_by_document)
    attention.register_varlen(attention.VARLEN)
    attention.KNOWN.add("window_size")
    return attention.VARLEN


def logits_by(name: str, model: Any, lengths: list[int], **told: Any) -> torch.Tensor:
    tokens = torch.arange(3, 3 + sum(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model.set_attn_implementation(name)
    with torch.no_grad():
        return model(input_ids=tokens, position_ids=positions, use_cache=False, **told).logits


@pytest.mark.parametrize("name", FITTING)
def test_with_the_kernel_a_model_says_what_it_says_without(name: str, kernel: str) -> None:
    torch.manual_seed(0)
    config = configuration(*FITTING[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    stir(model)
    bounds = torch.tensor([0, 14, 30], dtype=torch.int32)
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 16, "max_length_k": 16}
    assert torch.allclose(
        logits_by(kernel, model, [14, 16], **told), logits_by("eager", model, [14, 16]), rtol=1e-4, atol=1e-5
    )
    assert torch.allclose(logits_by(kernel, model, [30]), logits_by("eager", model, [30]), rtol=1e-4, atol=1e-5)


def test_values_may_be_wider_than_queries(kernel: str) -> None:
    query, key, value = (torch.randn(1, 2, 5, width) for width in (8, 8, 12))
    out, _ = attention.varlen(torch.nn.Module(), query, key, value, None)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(out, theirs.transpose(1, 2), atol=1e-6)


def test_sinks_are_refused_and_not_dropped(kernel: str) -> None:
    config = configuration("GptOssConfig", {"head_dim": 16, "num_local_experts": 4})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(Refusal, match="asks for s_aux"):
        logits_by(kernel, model, [8])


SCAN = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
SHARED = {**EXPERTS, "head_dim": 16, "num_experts": 4, "shared_expert_intermediate_size": 32}
# Families that keep documents apart, and such as remember a little of the one before.
APART: dict[str, tuple[str, dict[str, Any]]] = {
    **FITTING,
    "soft caps": OTHERS["soft caps"],
    "neox": ("GPTNeoXConfig", {}),
    "cohere2": ("Cohere2Config", {"sliding_window": 8}),
    "experts": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 16, "num_experts": 8}),
    "mixtral": ("MixtralConfig", {"head_dim": 16, "num_local_experts": 4}),
}
REMEMBERING: dict[str, tuple[str, dict[str, Any]]] = {
    "linear attention": ("Qwen3NextConfig", {**SHARED, "num_hidden_layers": 4}),
    "states beside attention": ("FalconH1Config", {**SCAN, "mamba_d_ssm": 64}),
    "recurrence": ("RecurrentGemmaConfig", {"num_hidden_layers": 3}),
    "states": ("JambaConfig", {"num_experts": 2, "num_hidden_layers": 4}),
    "convolutions": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
}
WEIGHTS = {"as at initialisation": 1.0, "small": 0.3}


def made(kind: str, particular: dict[str, Any], dtype: torch.dtype, weight: float = 1.0) -> Any:
    torch.manual_seed(0)
    config = configuration(kind, particular)
    config.use_cache = False
    name = attention.choose_attention("auto", config, dtype, torch.device("cpu"))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(weight)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", APART)
def test_a_model_that_keeps_documents_apart_may_be_trained_packed(name: str, weight: str, dtype: torch.dtype) -> None:
    model = made(*APART[name], dtype, WEIGHTS[weight])
    attention.check_packing(model, model.config, torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", REMEMBERING)
def test_a_model_that_remembers_a_little_of_the_document_before_is_refused(name: str, dtype: torch.dtype) -> None:
    model = made(*REMEMBERING[name], dtype)
    with pytest.raises(Refusal, match=r"see each other[^$]*packing: false"):
        attention.check_packing(model, model.config, torch.device("cpu"), dtype)


def test_chunks_that_count_from_a_windows_beginning_are_refused_in_windows_that_are_longer() -> None:
    config = {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": 64}
    model = made("Llama4TextConfig", config, torch.float32)
    attention.check_packing(model, model.config, torch.device("cpu"), torch.float32, 64)
    with pytest.raises(Refusal, match="chunks of 64 tokens"):
        attention.check_packing(model, model.config, torch.device("cpu"), torch.float32, 65)
