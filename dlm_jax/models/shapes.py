"""Architectures of well-known bases by hub id, as in their config.json, so that a run can be planned without them."""

from dlm_jax.models.config import ModelConfig, Rope


def gpt2(width: int, depth: int, heads: int) -> ModelConfig:
    """One of the sizes of OpenAI's GPT-2."""
    return ModelConfig(family="gpt2", vocab_size=50257, width=width, depth=depth, heads=heads, kv_heads=heads,
                       head_dim=64, mlp_width=4 * width, max_length=1024, rope=None, norm="layer", norm_eps=1e-5,
                       mlp="gelu", qkv_bias=True, output_bias=True, mlp_bias=True)


def qwen3(width: int, mlp_width: int, tied_head: bool) -> ModelConfig:
    """Qwen3 at 4B or 8B."""
    return ModelConfig(family="qwen3", vocab_size=151936, width=width, depth=36, heads=32, kv_heads=8, head_dim=128,
                       mlp_width=mlp_width, max_length=32768, rope=Rope(theta=1e6), norm="rms", norm_eps=1e-6,
                       mlp="swiglu", qk_norm=True, tied_head=tied_head)


SHAPES = {
    "gpt2": gpt2(768, 12, 12),
    "gpt2-medium": gpt2(1024, 24, 16),
    "meta-llama/Llama-2-7b-hf": ModelConfig(
        family="llama", vocab_size=32000, width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, mlp_width=11008,
        max_length=4096, rope=Rope(), norm="rms", norm_eps=1e-5, mlp="swiglu", tied_head=False),
    "Qwen/Qwen2.5-0.5B": ModelConfig(
        family="qwen2", vocab_size=151936, width=896, depth=24, heads=14, kv_heads=2, head_dim=64, mlp_width=4864,
        max_length=32768, rope=Rope(theta=1e6), norm="rms", norm_eps=1e-6, mlp="swiglu", qkv_bias=True),
    "Qwen/Qwen2.5-1.5B": ModelConfig(
        family="qwen2", vocab_size=151936, width=1536, depth=28, heads=12, kv_heads=2, head_dim=128, mlp_width=8960,
        max_length=131072, rope=Rope(theta=1e6), norm="rms", norm_eps=1e-6, mlp="swiglu", qkv_bias=True),
    "Qwen/Qwen3-4B-Base": qwen3(2560, 9728, tied_head=True),
    "Qwen/Qwen3-8B-Base": qwen3(4096, 12288, tied_head=False),
}
