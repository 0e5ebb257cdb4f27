"""A masked diffusion language model converted from GPT-2, LLaMA, Qwen2 or Qwen3, in plain PyTorch.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)  # or AutoModelForMaskedLM
    model(input_ids).logits                                  # raw outputs, under the rule used in training
    model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64)  # continues the text by denoising
    model.infill(input_ids)                                  # fills every mask token

This file is self-contained: dlm-jax wrote it next to the weights, and it needs only torch and transformers.
Letters in shapes: b batch, n tokens, m cached tokens, d width, h heads, g key-value heads, k head_dim, v vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

PAST = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # renamed in 5.24
VISIBILITIES = ("causal", "bidirectional", "block_causal", "token_causal")
# Settings of transformers' `generate`: those read here, and values of others that ask for nothing.
SETTINGS = {"max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k", "pad_token_id",
            "eos_token_id"}
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "min_length": 0, "use_cache": True}


class DLMConfig(PretrainedConfig):
    """The fields of the base model's own configuration, and these:

    base_model_type: gpt2, llama, qwen2 or qwen3.
    mask_token_id: the id of the mask token.
    rule: what a token attends to. `bidirectional`: everything; `block_causal`: its own block of `block_size` tokens,
        counted from the first token, and all earlier blocks; `causal`: itself and all earlier tokens.
    alignment: `same_position`, the output at n predicts token n; `shifted`, the output at n-1 predicts token n.
    clean_half: how the finished text before a block attends to itself: `block_causal`; or `token_causal`, left to right
    """

    model_type = "dlm"

    def __init__(self, bos_token_id: int | None = None, eos_token_id: int | None = None, **fields):
        super().__init__(**fields)
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id


class KVCache:
    """One layer's keys and values of the text so far: [b, m, g, k] each."""

    def __init__(self, k: Tensor | None = None, v: Tensor | None = None):
        self.finished, self.latest = (None if k is None else (k, v)), None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The cached keys and values, followed by those of the current tokens: [b, m + n, g, k]."""
        self.latest = (k, v) if self.finished is None else tuple(torch.cat(x, 1) for x in zip(self.finished, (k, v)))
        return self.latest

    def commit(self):
        """Keeps the keys and values of the latest forward pass: its tokens are finished."""
        self.finished = self.latest


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, cache: KVCache | None) -> Tensor:
    """q [b, n, h, k], k and v [b, n, g, k], visible bool [b or 1, 1, n, m + n], m being 0 without a cache; returns
    [b, n, h * k]."""
    if cache is not None:
        k, v = cache.extend(k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)


class GPT2Attention(nn.Module):
    def __init__(self, config: DLMConfig):
        super().__init__()
        self.heads = config.n_head
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, visible: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(attend(q, k, v, visible, cache))


class GPT2MLP(nn.Module):
    def __init__(self, config: DLMConfig):
        super().__init__()
        self.c_fc = Conv1D(config.n_inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(nn.Module):
    def __init__(self, config: DLMConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, visible: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), visible, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Trunk(nn.Module):
    def __init__(self, config: DLMConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor, caches: list[KVCache | None]) -> Tensor:
        """x: embeddings [b, n, d]; positions: [b or 1, n]."""
        x = x + self.wpe(positions)
        for block, cache in zip(self.h, caches):
            x = block(x, visible, cache)
        return self.ln_f(x)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class LlamaAttention(nn.Module):
    """LLaMA, Qwen2 (biases on q, k, v) and Qwen3 (q and k normalized)."""

    def __init__(self, config: DLMConfig):
        super().__init__()
        d, k, h, g = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        bias = getattr(config, "attention_bias", False)
        qkv_bias = bias or config.base_model_type == "qwen2"
        self.head_dim = k
        self.q_proj = nn.Linear(d, h * k, bias=qkv_bias)
        self.k_proj = nn.Linear(d, g * k, bias=qkv_bias)
        self.v_proj = nn.Linear(d, g * k, bias=qkv_bias)
        self.o_proj = nn.Linear(h * k, d, bias=bias)
        if config.base_model_type == "qwen3":
            self.q_norm = RMSNorm(k, config.rms_norm_eps)
            self.k_norm = RMSNorm(k, config.rms_norm_eps)

    def forward(self, x: Tensor, visible: Tensor, angles: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(rotate(q, angles), rotate(k, angles), v, visible, cache))


class LlamaMLP(nn.Module):
    def __init__(self, config: DLMConfig):
        super().__init__()
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config: DLMConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor, visible: Tensor, angles: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), visible, angles, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaTrunk(nn.Module):
    def __init__(self, config: DLMConfig):
        super().__init__()
        self.head_dim, self.rope = config.head_dim, dict(config.rope_parameters)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor, caches: list[KVCache | None]) -> Tensor:
        """x: embeddings [b, n, d]; positions: [b or 1, n]."""
        # The angles are computed here: a buffer that is not saved would be left uninitialized by `from_pretrained`.
        angles = positions[..., None].float() * rope_frequencies(self.rope, self.head_dim, x.device)
        for layer, cache in zip(self.layers, caches):
            x = layer(x, visible, angles, cache)
        return self.norm(x)


def rope_frequencies(rope: dict, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position for each of the head_dim / 2 planes, fp32."""
    frequency = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (smooth + (1 - smooth) / rope["factor"])
    return frequency


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates the planes (x_i, x_{i + k/2}) of x [b, n, h, k] by angles [b or 1, n, k/2]."""
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class DLMModel(PreTrainedModel, GenerationMixin):
    """The model and its sampler. `forward` returns raw outputs: in a `shifted` model those at n-1 predict token n."""

    config_class = DLMConfig
    _no_split_modules = ["GPT2Block", "LlamaBlock"]

    def __init__(self, config: DLMConfig):
        super().__init__(config)
        if config.base_model_type == "gpt2":
            self.transformer = GPT2Trunk(config)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self._tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
        else:
            self.model = LlamaTrunk(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.post_init()

    @property
    def trunk(self) -> GPT2Trunk | LlamaTrunk:
        return self.get_submodule("transformer" if self.config.base_model_type == "gpt2" else "model")  # type: ignore

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.trunk.h if isinstance(self.trunk, GPT2Trunk) else self.trunk.layers)

    @property
    def max_length(self) -> int:
        """The longest text that the model supports, in tokens."""
        gpt2 = self.config.base_model_type == "gpt2"
        return self.config.n_positions if gpt2 else self.config.max_position_embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.wte if isinstance(self.trunk, GPT2Trunk) else self.trunk.embed_tokens

    def set_input_embeddings(self, value: nn.Module):
        setattr(self.trunk, "wte" if isinstance(self.trunk, GPT2Trunk) else "embed_tokens", value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: tuple | Cache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool = False,
                store_kv: bool = True, return_dict: bool | None = None, rule: str | None = None,
                block_size: int | None = None, cache: tuple | Cache | None = None) -> CausalLMOutputWithPast | tuple:
        """Logits in fp32 [b, n, v] of tokens [b, n], or of their embeddings [b, n, d].

        attention_mask: [b, m + n], 0 for padding on either side; or, in place of `rule`, which keys each query attends
            to, [b or 1, n, m + n] or [b or 1, 1, n, m + n]: see `given_keys`.
        position_ids: [b, n]; default: counted from each row's first token that is not padding.
        past_key_values (or cache): the m tokens before, as a transformers `Cache`, to which this call adds its own if
            `store_kv`; or as (keys, values) [b, g, m, k] of each layer, which `use_cache` also returns with its own.
        labels: [b, n], -100 to be ignored: `loss` is the mean cross-entropy of the others, each by the output that
            predicts its position (see `alignment`).
        rule, block_size: default: those that the model was trained with.

        Raises `ValueError` for padding inside a row, a mask of another length, an unknown rule or one without block.
        """
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = cache if past_key_values is None else past_key_values
        caches = layer_caches(past_key_values, self.depth)
        n, m = x.shape[1], 0 if caches[0].finished is None else caches[0].finished[0].shape[1]
        index = torch.arange(m + n, device=x.device)[None]
        if attention_mask is not None and attention_mask.shape[-1] != m + n:
            raise ValueError(f"attention_mask is for {attention_mask.shape[-1]} tokens; it needs {m + n}, {m} cached")
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask.long()
            check_padding(attention_mask)
            index = (attention_mask.cumsum(1) - 1).clamp(min=0)
        visible = self._visible(index, n, attention_mask, rule, block_size)
        hidden = self.trunk(x, index[:, m:] if position_ids is None else position_ids, visible, caches)
        logits = self.lm_head(hidden).float()
        past = keep(caches, past_key_values, m, store_kv) if use_cache or isinstance(past_key_values, Cache) else None
        loss = None if labels is None else self._loss(logits, labels)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{PAST: past})
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _visible(self, index: Tensor, n: int, attention_mask: Tensor | None, rule: str | None,
                 block_size: int | None) -> Tensor:
        """Which of the m + n keys each of the last n tokens attends to. index: [b or 1, m + n], their places in the
        text."""
        if attention_mask is not None and attention_mask.ndim > 2:
            return given_keys(attention_mask)
        trained = "token_causal" if self.config.clean_half == "token_causal" else self.config.rule
        visible = visible_keys(rule or trained, index, block_size or self.config.block_size)[:, :, -n:]
        if attention_mask is None:
            return visible
        own = torch.eye(index.shape[1], dtype=torch.bool, device=index.device)[-n:]  # padding sees at least itself
        return visible & attention_mask[:, None, None].bool() | own

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.alignment == "shifted":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int | None = None, steps: int | None = None,
                 threshold: float | None = None, temperature: float | None = None, top_p: float | None = None,
                 top_k: int | None = None, seed: int | None = None, stop_at_eos: bool = True,
                 attention_mask: Tensor | None = None, do_sample: bool | None = None, max_length: int | None = None,
                 pad_token_id: int | None = None, eos_token_id: int | list[int] | None = None,
                 generation_config: GenerationConfig | None = None, block_length: int | None = None,
                 **others) -> Tensor:
        """`input_ids` [b, n] followed by at most `max_new_tokens`, denoised all at once, or block by block. A
        block-causal model has blocks of its own, and caches the keys and values of the finished ones.

        steps: denoising steps of the whole text; each block takes its share by the tokens it has to fill, rounded up.
            Default: one per token.
        block_length: tokens that a bidirectional model fills before the next ones, counted from the end of the prompt.
        threshold: instead, each forward pass commits every token above this confidence, and at least one.
        temperature: 0 takes the most likely token, the default unless `do_sample`, with which it is 1.
        attention_mask: [b, n], 0 for padding, on either side; a row's text does not depend on it.
        max_length: of prompt and text together, where max_new_tokens is not given.
        eos_token_id: the end-of-text token, or several.
        generation_config: gives what is not given here; then the model's own does.
        others: what else transformers' `generate` takes, if it asks for nothing (`num_beams=1`).
        After a row's first end-of-text token everything is `pad_token_id`, by default the first of these; the result is
        cut where all rows have ended.
        Raises `ValueError` for arguments out of range, and for more tokens than the model supports; `TypeError` for a
        setting of transformers, here or in a generation config, that denoising lacks.
        """
        pick = Defaults(generation_config, self.generation_config)
        check_supported(others | pick.rest())
        if do_sample is None:
            do_sample = temperature is not None or pick("do_sample", None, False)
        temperature = pick("temperature", temperature, 1.0) if do_sample else 0.0
        sampler = Sampler(temperature, pick("top_p", top_p, 1.0), pick("top_k", top_k, 0), seed, input_ids.device)
        ends = pick("eos_token_id", eos_token_id, self.config.eos_token_id) if stop_at_eos else None
        eos = input_ids.new_tensor([] if ends is None else ends).flatten()
        new = pick("max_new_tokens", max_new_tokens, None)
        if new is None:
            new = pick("max_length", max_length, 0) - input_ids.shape[-1]
        if new < 1:
            raise ValueError(f"max_new_tokens, or max_length beyond the prompt, must be at least 1, not {new}")
        pad = pick("pad_token_id", pad_token_id, int(eos[0]) if len(eos) else None)
        texts = self._continue(input_ids, attention_mask, new, steps, threshold, block_length, sampler, eos)
        width = max(len(text) for text in texts)
        padded = [F.pad(text, (0, width - len(text)), value=pad) for text in texts]
        return torch.cat([input_ids, torch.stack(padded)], dim=1)

    def _continue(self, input_ids: Tensor, attention_mask: Tensor | None, new: int, steps: int | None,
                  threshold: float | None, block_length: int | None, sampler: "Sampler", eos: Tensor) -> list[Tensor]:
        """What follows each row, without padding, up to its first `eos`. Rows of one length are denoised together."""
        check_ids(input_ids)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        check_padding(seen)
        lengths, texts = seen.sum(1).tolist(), {}
        for length in sorted(set(lengths)):
            rows = [row for row, n in enumerate(lengths) if n == length]
            prompts, added = self._with_start(torch.stack([input_ids[row][seen[row].bool()] for row in rows]))
            tokens = F.pad(prompts, (0, new), value=self.config.mask_token_id)
            canvas = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) >= prompts.shape[1]
            filled = self._denoise(tokens, canvas, steps, threshold, block_length, sampler, eos)[:, length + added:]
            texts |= {row: up_to(text, eos) for row, text in zip(rows, filled)}
        return [texts[row] for row in range(len(lengths))]

    @torch.no_grad()
    def infill(self, input_ids: Tensor, steps: int | None = None, threshold: float | None = None,
               temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None) -> Tensor:
        """`input_ids` [b, n] with every mask token filled in. The arguments are those of `generate`."""
        check_ids(input_ids)
        input_ids, added = self._with_start(input_ids)
        canvas = input_ids == self.config.mask_token_id
        if self.config.alignment == "shifted" and bool(canvas[:, 0].any()):
            raise ValueError("nothing predicts the first token of this model; put a start token before the mask")
        sampler = Sampler(temperature, top_p, top_k, seed, input_ids.device)
        return self._denoise(input_ids, canvas, steps, threshold, None, sampler, input_ids.new_tensor([]))[:, added:]

    def _with_start(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """`input_ids` [b, n] preceded by the start token used in training, unless all rows begin with it; and how many
        tokens were added."""
        start = self.config.eos_token_id if self.config.bos_token_id is None else self.config.bos_token_id
        added = int(start is not None and not (input_ids.shape[1] and bool((input_ids[:, 0] == start).all())))
        if self.config.alignment == "shifted" and input_ids.shape[1] + added == 0:
            raise ValueError("nothing predicts the first token of this model; begin with a start token")
        return F.pad(input_ids, (added, 0), value=start or 0), added

    def _denoise(self, tokens: Tensor, canvas: Tensor, steps: int | None, threshold: float | None,
                 block_length: int | None, sampler: "Sampler", eos: Tensor) -> Tensor:
        """Fills `canvas`, bool [b, n], of `tokens` [b, n] block by block; one block is everything, unless the model has
        blocks or `block_length` is given. Stops early once every row has one of `eos` in its canvas.

        With blocks of its own a model reads a block and the cache of those before it, otherwise the whole text.
        """
        n, most_holes = tokens.shape[1], int(canvas.sum(1).max())
        self._check_denoising(n, steps, threshold, block_length)
        by_blocks = self.config.rule == "block_causal"
        size = self.config.block_size if by_blocks else block_length or n
        caches = [KVCache() if by_blocks else None for _ in range(self.depth)]
        first_hole = int(canvas.any(0).int().argmax()) if most_holes else n
        first = first_hole // size * size if by_blocks else first_hole  # where the first block with a hole starts
        prefilled = by_blocks and first
        prev_hidden = self._forward_cached(tokens[:, :first], caches, 0, clean=True)[:, -1:] if prefilled else None
        for start in range(first, n, size):
            end = min(start + size, n)
            masked = F.pad(canvas[:, start:end], (start, n - end))
            holes = int(masked.sum(1).max())
            share = holes if steps is None else math.ceil(steps * holes / max(most_holes, 1))
            left, right = (start, end) if by_blocks else (0, n)
            filled = self._denoise_span(tokens[:, left:right], masked[:, left:right], share, threshold, sampler, caches,
                                        left, prev_hidden)
            tokens = torch.cat([tokens[:, :left], filled, tokens[:, right:]], dim=1)
            if bool((canvas & torch.isin(tokens, eos))[:, :end].any(1).all()):
                return tokens[:, :end]
            if by_blocks and bool(canvas[:, end:].any()):
                prev_hidden = self._forward_cached(filled, caches, start, clean=True)[:, -1:]
        return tokens

    def _check_denoising(self, n: int, steps: int | None, threshold: float | None, block_length: int | None):
        """Raises `ValueError` for settings out of range, and for a text of n tokens that is too long."""
        if n > self.max_length:
            raise ValueError(f"{n} tokens are more than the {self.max_length} that this model supports")
        for name, value in (("steps", steps), ("block_length", block_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"the threshold must lie in [0, 1], not {threshold}")
        own = self.config.block_size if self.config.rule == "block_causal" else None
        if own and block_length not in (None, own):
            raise ValueError(f"this model has blocks of {own}, not of {block_length}; leave out block_length")

    def _denoise_span(self, tokens: Tensor, masked: Tensor, steps: int, threshold: float | None, sampler: "Sampler",
                      caches: list[KVCache | None], start: int, prev_hidden: Tensor | None) -> Tensor:
        """Fills `masked`, bool [b, n], of a span of `tokens` [b, n] that begins at position `start`.

        Each step commits the most confident proposals: all above the threshold and at least one, or without a threshold
        an equal part of what is still masked. prev_hidden: the output [b, 1, d] just before the span.
        """
        steps_left = steps
        while bool(masked.any()):
            hidden = self._forward_cached(tokens, caches, start, clean=False)
            if self.config.alignment == "shifted":
                hidden = torch.cat([hidden[:, :1] if prev_hidden is None else prev_hidden, hidden[:, :-1]], dim=1)
            logits = self.lm_head(hidden).float()
            logits[..., self.config.mask_token_id] = -torch.inf
            proposal, confidence = tokens.clone(), torch.full(tokens.shape, -1.0, device=tokens.device)
            proposal[masked], confidence[masked] = sampler.draw(logits[masked])
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            if threshold is None:
                chosen = rank < (masked.sum(1, keepdim=True) + steps_left - 1) // steps_left
            else:
                chosen = (rank < 1) | (confidence > threshold)
            commit = masked & chosen
            tokens, masked = torch.where(commit, proposal, tokens), masked & ~commit
            steps_left = max(steps_left - 1, 1)
        return tokens

    def _forward_cached(self, tokens: Tensor, caches: list[KVCache | None], start: int, clean: bool) -> Tensor:
        """Outputs [b, n, d] at `tokens` [b, n], which follow `start` cached tokens. Clean (finished) tokens are then
        added to the cache."""
        n, rule = tokens.shape[1], self.config.rule
        if clean and self.config.clean_half == "token_causal":
            rule = "causal"
        index = torch.arange(start + n, device=tokens.device)[None]
        visible = visible_keys(rule, index, self.config.block_size)[:, :, start:]
        hidden = self.trunk(self.get_input_embeddings()(tokens), index[:, start:], visible, caches)
        if clean:
            for cache in caches:
                if cache is not None:
                    cache.commit()
        return hidden


class Sampler:
    """Draws a token from each row of logits, and returns its probability."""

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int | None, device: torch.device):
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
            raise ValueError("temperature and top_k must not be negative and top_p must be in (0, 1]; got "
                             f"temperature {temperature}, top_p {top_p}, top_k {top_k}")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [m, v] -> tokens [m], and the probability of each [m] before temperature and truncation."""
        probability = logits.softmax(-1)
        if self.temperature == 0:
            confidence, tokens = probability.max(-1)
            return tokens, confidence
        truncated = self.truncate((logits / self.temperature).softmax(-1))
        tokens = torch.multinomial(truncated, 1, generator=self.generator)
        return tokens[:, 0], probability.gather(-1, tokens)[:, 0]

    def truncate(self, probability: Tensor) -> Tensor:
        """probability [m, v], zero outside the `top_k` most likely tokens and the smallest set that reaches `top_p`."""
        ordered, order = probability.sort(dim=-1, descending=True)
        dropped = ordered.cumsum(-1) - ordered >= self.top_p
        if self.top_k:
            dropped[:, self.top_k:] = True
        return probability.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0)


class Defaults:
    """Finds a setting: what was given, else what the first of the configs says that has it, else `otherwise`."""

    def __init__(self, *configs: GenerationConfig | None):
        self.configs = configs

    def __call__(self, name: str, given, otherwise):
        found = [given, *(getattr(config, name, None) for config in self.configs)]
        return next((value for value in found if value is not None), otherwise)

    def rest(self) -> dict:
        """What the configs ask for and nobody reads here. The start token is the model's."""
        asked: dict = {}
        for config in reversed([config for config in self.configs if config is not None]):
            asked |= config.to_diff_dict()
        unread = asked.keys() - SETTINGS - {"bos_token_id", "transformers_version"}
        return {name: asked[name] for name in unread if not name.startswith("_")}


def check_supported(settings: dict):
    """Raises `TypeError` for settings of transformers' `generate` that ask for what denoising lacks."""
    asking = sorted(name for name, value in settings.items()
                    if not (value is None or value is False or name in NEUTRAL and value == NEUTRAL[name]))
    if asking:
        raise TypeError(f"this model writes by denoising, which has no {', '.join(asking)}; leave that out")


def layer_caches(past: tuple | Cache | None, depth: int) -> list[KVCache]:
    """A `KVCache` of each layer, with what `past_key_values` hold."""
    if past is None or (isinstance(past, Cache) and past.get_seq_length() == 0):
        return [KVCache() for _ in range(depth)]
    layers = [(layer.keys, layer.values) for layer in past.layers] if isinstance(past, Cache) else past
    return [KVCache(k.transpose(1, 2), v.transpose(1, 2)) for k, v in layers]


def keep(caches: list[KVCache], past: tuple | Cache | None, m: int, store_kv: bool) -> tuple | Cache:
    """The keys and values after a forward pass, in the form of `past`, which held m tokens."""
    layers = tuple((k.transpose(1, 2), v.transpose(1, 2)) for k, v in (cache.latest for cache in caches))
    if not isinstance(past, Cache):
        return layers
    for layer, (k, v) in enumerate(layers if store_kv else ()):
        past.update(k[:, :, m:], v[:, :, m:], layer)
    return past


def check_ids(input_ids: Tensor):
    """Raises `ValueError` unless `input_ids` are integers [b, n]."""
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids must be integers [batch, tokens], not {list(input_ids.shape)}")


def check_padding(attention_mask: Tensor):
    """Raises `ValueError` unless each row [b, n] is one run of ones, with zeros around it."""
    if bool((attention_mask.diff(dim=1, prepend=torch.zeros_like(attention_mask[:, :1])) == 1).sum(1).gt(1).any()):
        raise ValueError("padding must be at the ends of a row: an attention_mask has its ones side by side")


def given_keys(mask: Tensor) -> Tensor:
    """A caller's mask of keys, [b, n, m] or [b, 1, n, m], as bool [b, 1, n, m]. A query attends where it is True or 1;
    or, if nothing in it is positive, where it is 0, since transformers adds such a mask to the scores."""
    mask = mask[:, None] if mask.ndim == 3 else mask
    return mask.bool() if mask.dtype == torch.bool or bool((mask > 0).any()) else mask == 0


def visible_keys(rule: str, index: Tensor, block_size: int | None) -> Tensor:
    """Which keys each query attends to: bool [b or 1, 1, n, n], of tokens at the places `index` [b or 1, n]."""
    if rule not in VISIBILITIES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(VISIBILITIES)}")
    if rule == "bidirectional":
        return torch.ones(*index.shape, index.shape[1], dtype=torch.bool, device=index.device)[:, None]
    if rule == "causal":
        block_size = 1
    if not block_size:
        raise ValueError(f"the rule {rule} needs a block_size")
    block = index // block_size
    # Under token_causal only the last block is a block; the tokens before it are causal.
    order = torch.where(block == block[:, -1:], index.amax(1, keepdim=True), index) if rule == "token_causal" else block
    return (order[:, :, None] >= order[:, None, :])[:, None]


def up_to(text: Tensor, eos: Tensor) -> Tensor:
    """`text` [n] up to and including the first of `eos`."""
    ends = torch.isin(text, eos).nonzero()
    return text[:int(ends[0]) + 1] if len(ends) else text
