"""config.json of well-known models, as far as it shapes them, and of a tiny one to reckon by hand."""

from __future__ import annotations

from typing import Any

from hpcft.plan.shape import Shape, shape_of


def config(
    hidden: int, layers: int, heads: int, keys: int, inner: int, vocabulary: int, tied: bool = False, **more: Any
) -> dict[str, Any]:
    """A dense decoder with a gated feed-forward."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        **more,
    }


# (config.json of the model, parameters as its authors' safetensors count them)
PUBLISHED = {
    "Qwen2.5-0.5B": (config(896, 24, 14, 2, 4864, 151936, tied=True), 494_032_768),
    "Qwen2.5-1.5B": (config(1536, 28, 12, 2, 8960, 151936, tied=True), 1_543_714_304),
    "Qwen2.5-7B": (config(3584, 28, 28, 4, 18944, 152064), 7_615_616_512),
    "Qwen2.5-14B": (config(5120, 48, 40, 8, 13824, 152064), 14_770_033_664),
    "Qwen2.5-32B": (config(5120, 64, 40, 8, 27648, 152064), 32_763_876_352),
    "Qwen2.5-72B": (config(8192, 80, 64, 8, 29568, 152064), 72_706_203_648),
    "Qwen3-8B": (config(4096, 36, 32, 8, 12288, 151936, head_dim=128), 8_190_735_360),
    "Qwen3-0.6B": (config(1024, 28, 16, 8, 3072, 151936, tied=True, head_dim=128), 596_049_920),
    "Llama-2-7b": (config(4096, 32, 32, 32, 11008, 32000), 6_738_415_616),
    "Llama-3.1-8B": (config(4096, 32, 32, 8, 14336, 128256), 8_030_261_248),
    "Llama-3.2-1B": (config(2048, 16, 32, 8, 8192, 128256, tied=True, head_dim=64), 1_235_814_400),
    "Mistral-7B-v0.3": (config(4096, 32, 32, 8, 14336, 32768), 7_248_023_552),
}
MIXTRAL = config(4096, 32, 32, 8, 14336, 32000, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
QWEN3_30B_A3B = config(
    2048, 48, 32, 4, 6144, 151936, model_type="qwen3_moe",
    head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, decoder_sparse_step=1,
)  # fmt: skip
TINY = config(8, 4, 4, 2, 16, 32)


def shape(name: str) -> Shape:
    """The shape of a published model."""
    found = shape_of(PUBLISHED[name][0])
    assert found is not None
    return found
