"""The library's main interface: a model with its tokenizer, to sample, infill, evaluate, save and export."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.attention.rules import Rule
from dlm_jax.attention.visibility import denoising_rule
from dlm_jax.convert.gguf_export import write_gguf
from dlm_jax.convert.hf_export import write_hf
from dlm_jax.convert.model_card import CardOptions
from dlm_jax.convert.native import write_native
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.evaluation.log_likelihood import (
    AR,
    Likelihood,
    ProgressFn,
    denoising_recipe,
    likelihood,
    silent,
    texts_to_rows,
)
from dlm_jax.files import new_directory
from dlm_jax.loading import load_bundle, load_tokenizer, with_mask_token
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import CLEAN_HALVES, VISIBILITIES, DiffusionSpec
from dlm_jax.models.sharding import place_params
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.models.weights import Params, parameter_count
from dlm_jax.parallel.mesh import sampling_mesh
from dlm_jax.sampling.generation import generate
from dlm_jax.sampling.requests import Request, check, check_length, continuation, with_holes
from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.settings import Settings
from dlm_jax.sampling.trace import Callback
from dlm_jax.typing import Array, Float, Int, Logits

Texts = list[str] | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model ready to use. `dlm_jax.load` makes one."""

    config: ModelConfig
    params: Params
    spec: DiffusionSpec  # how it denoises
    tokenizer: Tokenizer | None  # None if its directory has none; methods that take text then raise `UserError`

    def __repr__(self) -> str:
        facts = {"rule": self.spec.rule, "alignment": self.spec.alignment, "block_size": self.spec.block_size,
                 "mask_token_id": self.spec.mask_token_id}
        stated = "".join(f", {name}={value}" for name, value in facts.items() if value is not None)
        return f"LanguageModel({self.config.family}, {parameter_count(self.config):,} parameters{stated})"

    def logits(self, tokens: Int[Array, "b n"], rule: str | None = None,
               block_size: int | None = None) -> Float[Array, "b n v"]:
        """Raw outputs of one forward pass, fp32 [batch, length, vocab], for tokens int [batch, length].

        With the alignment `shifted`, the output at n-1 predicts token n; with `same_position`, the output at n does.

        rule: 'causal', 'bidirectional', 'block_causal', or 'token_causal' (the last block sees itself and all before
        it, and what is before it is causal); default: the model's own.
        block_size: tokens per block of the last two; default: the model's own.

        Raises `UserError` for an unknown rule, a block rule without a block size, rows longer than the model's context,
        and ids outside the vocabulary.
        """
        rule = rule or self.spec.visibility
        if rule not in VISIBILITIES:
            raise UserError(f"rule '{rule}' is not one of {', '.join(VISIBILITIES)}")
        block_size = block_size or self.spec.block_size
        if rule in CLEAN_HALVES and (block_size or 0) < 1:
            raise UserError(f"the rule {rule} needs a block_size of at least 1; pass one")
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] > self.config.max_length:
            raise UserError(f"tokens must be [batch, length] with at most {self.config.max_length} per row, not of "
                            f"shape {list(tokens.shape)}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise UserError(f"a token id lies outside the vocabulary of {self.config.vocab_size}; pass ids of "
                            "this model's tokenizer")
        return _logits(self.params, tokens, denoising_rule(rule, block_size), self.config)

    @overload
    def sample(self, prompt: str = "", *, max_tokens: int = 64, stop: str | None = None,
               callback: Callback | None = None, **settings: Any) -> Sample: ...

    @overload
    def sample(self, prompt: Texts, *, max_tokens: int = 64, stop: str | None = None,
               callback: Callback | None = None, **settings: Any) -> list[Sample]: ...

    def sample(self, prompt: str | Texts = "", *, max_tokens: int = 64, stop: str | None = None,
               callback: Callback | None = None, **settings: Any) -> Sample | list[Sample]:
        """Continues a prompt: returns a `Sample`, or for several prompts a list of them, decoded as one batch.

        prompt: text; '' samples unconditionally.
        max_tokens: the most tokens to add.
        stop: the token that ends a text; default: the model's own end token.
        callback: called after every step with a `Trace` of numpy arrays.
        settings: the fields of `Settings`, such as unmasking='threshold:0.9', steps=32, temperature=0.7, seed=1.
        A plain autoregressive model is decoded left to right and needs no unmasking strategy.

        Raises `UserError` without a tokenizer, for settings out of range, and for a prompt that contains the mask token
        or does not fit the model's context together with `max_tokens`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        requests = [self.continuation(text, max_tokens) for text in prompts]
        samples = self.ending_with(stop).fill(requests, Settings(**settings), callback=callback)
        return samples[0] if isinstance(prompt, str) else samples

    @overload
    def infill(self, text: str, *, callback: Callback | None = None, **settings: Any) -> Sample: ...

    @overload
    def infill(self, text: Texts, *, callback: Callback | None = None, **settings: Any) -> list[Sample]: ...

    def infill(self, text: str | Texts, *, callback: Callback | None = None,
               **settings: Any) -> Sample | list[Sample]:
        """Fills the holes in a text: returns a `Sample`, or for several texts a list of them, decoded as one batch.

        text: a hole is marked [MASK:n], n tokens wide. A hole of unknown width is marked [MASK:a-b]: every width from a
        to b is tried, and the one with the best `Sample.score` is returned. Its `nfe` counts all of them.
        callback, settings: as in `sample`.

        A block-causal model conditions on the text left of a hole and in the hole's own block, and on nothing after it.

        Raises `UserError` without a tokenizer, for a plain autoregressive model, for settings out of range, and for a
        text without a hole, with the mask token itself, with too many widths to try, or too long for the context.
        """
        texts = [text] if isinstance(text, str) else list(text)
        choices = [self.with_holes(t) for t in texts]
        numbers = [i for i, requests in enumerate(choices) for _ in requests]
        samples = iter(self.fill([request for requests in choices for request in requests], Settings(**settings),
                                 numbers, callback))
        best = [best_of([next(samples) for _ in requests]) for requests in choices]
        return best[0] if isinstance(text, str) else best

    def continuation(self, prompt: str, max_tokens: int) -> Request:
        """The request that `sample` makes of a prompt. Raises `UserError` if `max_tokens` exceeds the context."""
        check_length(max_tokens, self.config.max_length)
        return continuation(self.encode(prompt), max_tokens)

    def with_holes(self, text: str) -> list[Request]:
        """The requests that `infill` makes of a text: one for each choice of hole widths.

        Raises `UserError` for a plain autoregressive model, and for a text without holes or with too many choices.
        """
        if not self.spec.is_diffusion:
            raise UserError("a plain autoregressive model cannot fill a hole; adapt it first with `dlm train`")
        return with_holes(text, self.encode, self.text_tokenizer().encode_inside, self.config.max_length)

    def check(self, request: Request) -> None:
        """Raises `UserError` if the model cannot serve the request."""
        check(request, self.config, self.spec)

    def fill(self, requests: Sequence[Request], settings: Settings, numbers: Sequence[int] | None = None,
             callback: Callback | None = None) -> list[Sample]:
        """One sample per request, in order, with its text if there is a tokenizer: see `generate`.

        numbers: the random stream of each request; default: its index. Raises `UserError` for a request that the model
        cannot serve.
        """
        samples = generate(self.params, self.config, self.spec, requests, settings, numbers, callback)
        if self.tokenizer is None:
            return samples
        return [dataclasses.replace(s, text=self.tokenizer.decode(s.tokens)) for s in samples]

    def ending_with(self, token: str | None) -> "LanguageModel":
        """The model with another token that ends a text; None leaves it unchanged.

        Raises `UserError` if `token` is not exactly one token.
        """
        if token is None:
            return self
        ids = self.text_tokenizer().encode_inside(token)
        if len(ids) != 1:
            raise UserError(f"{token!r} is not one token of this tokenizer but {len(ids)}, so a text cannot end with "
                            "it; choose a single token")
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, eos_token_id=ids[0]))

    def nelbo(self, texts: str | Sequence[str], *, mc_samples: int = 4, seed: int = 0,
              progress: ProgressFn = silent) -> Likelihood:
        """Upper bound of -log p(texts) by the model's own way of denoising, over `mc_samples` noisings of each text;
        `progress` is called with how many of these are done, and how many there are.

        Texts are truncated to the model's context. A plain autoregressive model is evaluated the way adaptation starts
        from it: one stream, shifted, everything visible, with a new mask row at the mean.

        Returns the mean in nats per token, a float that also carries `tokens` and `nats`. Raises `UserError` without a
        tokenizer, and if no text has a token to predict.
        """
        model = self if self.spec.mask_token_id is not None else self.with_mask()
        recipe = denoising_recipe(self.spec)
        return likelihood(model.params, model.config, recipe, model.spec.mask_token_id, self._rows(texts), mc_samples,
                          seed, progress)

    def ar_nll(self, texts: str | Sequence[str], progress: ProgressFn = silent) -> Likelihood:
        """-log p(texts) left to right under the causal rule, the output at n-1 predicting token n.

        Texts are truncated to the model's context; `progress` is called with how many are done, and how many there are.
        Returns the mean in nats per token, a float that also carries `tokens` and `nats`. Raises `UserError` without a
        tokenizer, and if no text has a token to predict.
        """
        return likelihood(self.params, self.config, AR, None, self._rows(texts), progress=progress)

    def with_mask(self, mask: str = "new") -> "LanguageModel":
        """The model with a mask token: 'new', a token, or an id. Raises `UserError` as `with_mask_token` does."""
        bundle, tokenizer = with_mask_token(self._bundle(), self.tokenizer, mask)
        return LanguageModel(bundle.config, bundle.params, bundle.spec, tokenizer)

    def save(self, directory: str | Path) -> None:
        """Writes a native model directory, completely or not at all.

        Raises `UserError` if `directory` is not empty or cannot be written.
        """
        self._write(directory, write_native)

    def export(self, directory: str | Path, dtype: str | None = None, layout: str | None = None,
               **card: Unpack[CardOptions]) -> None:
        """Writes a Hugging Face directory for PyTorch, completely or not at all.

        dtype: `float32` or `bfloat16`; default: the dtype of the parameters. layout: a name in `convert.LAYOUTS`, by
        which an inference engine reads the model; default: our own, or the family's if the model does not denoise.
        `gguf` writes a file for llama.cpp instead, with matrices in `float32`, `float16` (default) or `q8_0`.
        card: what the model card says beyond what the model knows: scores={"GSM8K": 0.31}, license="apache-2.0",
        datasets=["allenai/c4"].
        Raises `UserError` for another dtype, if `directory` is not empty or cannot be written, and if the family's
        Hugging Face class or the layout cannot express the model.
        """
        if layout == "gguf":
            self._write(directory, functools.partial(write_gguf, dtype=dtype, **card))
        else:
            self._write(directory, functools.partial(write_hf, dtype=dtype, layout=layout, **card))

    def encode(self, text: str) -> list[int]:
        """The start token, if any, and the ids of a text. A model without a start token uses its end token instead."""
        start = self.spec.start_id
        return [*([] if start is None else [start]), *self.text_tokenizer().encode(text)]

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises `UserError` if there is none."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer files, so it cannot read or write text; copy its "
                            "tokenizer.json and tokenizer_config.json into its directory")
        return self.tokenizer

    def _rows(self, texts: str | Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, segments), int32 [length], of each text, truncated to the context."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = texts_to_rows([self.encode(text)[:self.config.max_length] for text in texts])
        if not any(len(tokens) > 1 for tokens, _ in rows):
            raise UserError("no text has a token to predict; pass longer texts")
        return rows

    def _bundle(self) -> Bundle:
        return Bundle(self.config, self.params, self.spec)

    def _write(self, directory: str | Path, write: Callable[[Path, Bundle], None]) -> None:
        with new_directory(directory) as partial:
            if self.tokenizer is not None:
                self.tokenizer.save(partial)
            write(partial, self._bundle())  # last, since it may add the checksums of all files


def best_of(samples: Sequence[Sample]) -> Sample:
    """The sample with the best score, with the forward passes of all of them as its `nfe`."""
    best = max(samples, key=lambda sample: sample.score)
    return dataclasses.replace(best, nfe=sum(sample.nfe for sample in samples))


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, tokens: Int[jax.Array, "b n"], rule: Rule, config: ModelConfig) -> Logits:
    return unembed(params, forward(params, tokens, config=config, rule=rule), config)


def load(source: str | Path, tensor: int = 1, fsdp: int = 1) -> LanguageModel:
    """Loads a model: a native, work or Hugging Face directory, a hub id, or 'bundled' for the one in the package.

    tensor, fsdp: how many devices of this host hold the weights together, for a model that one device cannot hold; such
    a model is for sampling and evaluating. `tensor` devices compute a text together, each its own heads and columns;
    `fsdp` compute their own texts and gather the weights of each layer just before use, which only large batches pay.

    Raises `UserError` if there is no such model, it is incomplete or damaged, or cannot be so divided.
    """
    bundle = load_bundle(source)
    spec, tokenizer = bundle.spec, load_tokenizer(bundle)
    if tokenizer is not None:  # start and end tokens that the model does not name come from its tokenizer
        bos_id = tokenizer.bos_id if spec.start_id is None else spec.bos_token_id
        spec = dataclasses.replace(spec, bos_token_id=bos_id, eos_token_id=tokenizer.eos_id)
    if (tensor, fsdp) != (1, 1):
        params = place_params(bundle.params, bundle.config, sampling_mesh(tensor, fsdp))
    else:
        params = jax.tree.map(jnp.asarray, bundle.params)
    return LanguageModel(bundle.config, params, spec, tokenizer)
