"""The library's front: a model with its tokenizer, and what one does with them in a notebook."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.attention.rules import Bidirectional, BlockCausal, Causal, LastBlock
from dlm_jax.convert.hf_export import write_hf
from dlm_jax.convert.native import write_native
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.evaluation.likelihood import (
    AR,
    Likelihood,
    Progress,
    denoising_recipe,
    likelihood,
    silent,
    texts_to_rows,
)
from dlm_jax.files import new_directory
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import CLEAN_HALVES, VISIBILITIES, Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.models.weights import Params
from dlm_jax.opening import open_bundle, open_tokenizer, with_mask
from dlm_jax.sampling.generate import generate
from dlm_jax.sampling.requests import Request, check, check_length, continuation, with_holes
from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.settings import Settings
from dlm_jax.sampling.trace import Callback


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model, its card and its tokenizer (None where its directory has none; calls that need text then refuse)."""

    config: ModelConfig
    params: Params
    card: Card
    tokenizer: Tokenizer | None

    def logits(self, tokens: Any, rule: str | None = None, block_size: int | None = None) -> jax.Array:
        """Raw outputs, fp32 [batch, length, vocab], of tokens int [batch, length].

        rule: 'causal', 'bidirectional', or of `block_size` 'block_causal' or 'token_causal' (the last block sees itself
        whole, all before it is causal); by default the model's own.
        """
        rule = rule or self.card.visibility
        if rule not in VISIBILITIES:
            raise UserError(f"rule '{rule}' is not one of {', '.join(VISIBILITIES)}")
        block_size = block_size or self.card.block_size
        if rule in CLEAN_HALVES and (block_size or 0) < 1:
            raise UserError(f"the rule {rule} needs a block_size of at least 1; name one")
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] > self.config.max_length:
            raise UserError(f"tokens must be [batch, length] with at most {self.config.max_length} a row, not of shape "
                            f"{list(tokens.shape)}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise UserError(f"a token id lies outside the vocabulary of {self.config.vocab_size}")
        rules = {"causal": Causal(), "bidirectional": Bidirectional(), "block_causal": BlockCausal(block_size or 1),
                 "token_causal": LastBlock(block_size or 1)}
        return _logits(self.params, tokens, rules[rule], self.config)

    def sample(self, prompt: str | Sequence[str] = "", *, max_tokens: int = 64, stop: str | None = None,
               callback: Callback | None = None, **settings: Any) -> Any:
        """Continues a prompt, or several at once: a `Sample`, or a list of them. An empty prompt is unconditional.

        stop: the token that ends a text; default: the model's own. callback: told of every step. settings: those of
        `Settings`, such as order='threshold:0.9', steps=32, temperature=0.7, seed=1. A plain autoregressive model is
        decoded left to right and needs no order.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        requests = [self.continuation(text, max_tokens) for text in prompts]
        samples = self.ending_with(stop).fill(requests, Settings(**settings), callback=callback)
        return samples[0] if isinstance(prompt, str) else samples

    def infill(self, text: str | Sequence[str], *, callback: Callback | None = None, **settings: Any) -> Any:
        """Fills holes marked [MASK:n], n tokens wide: a `Sample`, or a list of them for several texts. The width of a
        hole marked [MASK:a-b] is the one whose filling scores best (`Sample.score`).

        A block-causal model sees what stands left of a hole and in the hole's own block, and nothing after that.
        callback and settings: as in `sample`.
        """
        texts = [text] if isinstance(text, str) else list(text)
        choices = [self.with_holes(t) for t in texts]
        numbers = [i for i, requests in enumerate(choices) for _ in requests]
        samples = iter(self.fill([request for requests in choices for request in requests], Settings(**settings),
                                 numbers, callback))
        best = [best_of([next(samples) for _ in requests]) for requests in choices]
        return best[0] if isinstance(text, str) else best

    def continuation(self, prompt: str, max_tokens: int) -> Request:
        """What `sample` makes of a prompt."""
        check_length(max_tokens, self.config.max_length)
        return continuation(self.encode(prompt), max_tokens)

    def with_holes(self, text: str) -> list[Request]:
        """What `infill` makes of a text: one request for each choice of widths."""
        if not self.card.is_diffusion:
            raise UserError("a plain autoregressive model cannot fill a hole; adapt it first with `dlm train`")
        return with_holes(text, self.encode, self.text_tokenizer().encode_inside, self.config.max_length)

    def check(self, request: Request) -> None:
        """Raises `UserError` for a request that the model cannot serve."""
        check(request, self.config, self.card)

    def fill(self, requests: Sequence[Request], settings: Settings, numbers: Sequence[int] | None = None,
             callback: Callback | None = None) -> list[Sample]:
        """One sample a request, as `generate` makes it, with its text."""
        samples = generate(self.params, self.config, self.card, requests, settings, numbers, callback)
        if self.tokenizer is None:
            return samples
        return [dataclasses.replace(s, text=self.tokenizer.decode(s.tokens)) for s in samples]

    def ending_with(self, token: str | None) -> "LanguageModel":
        """The model with another token that ends a text; None leaves it as it is."""
        if token is None:
            return self
        ids = self.text_tokenizer().encode_inside(token)
        if len(ids) != 1:
            raise UserError(f"{token!r} is not one token of this tokenizer but {len(ids)}, so a text cannot end with "
                            "it; name one that is")
        return dataclasses.replace(self, card=dataclasses.replace(self.card, eos_token_id=ids[0]))

    def nelbo(self, texts: str | Sequence[str], *, samples: int = 4, seed: int = 0,
              progress: Progress = silent) -> Likelihood:
        """Upper bound of -log p(texts) by the model's own way of denoising, over `samples` noisings of each text;
        `progress` is called with how many of these are done, and how many there are.

        Texts are cut at the model's context. A plain autoregressive model is read as adaptation would start from it:
        one stream, shifted, everything visible, with a new mask row at the mean.
        """
        model = self if self.card.mask_token_id is not None else self.with_mask()
        recipe = denoising_recipe(self.card)
        return likelihood(model.params, model.config, recipe, model.card.mask_token_id, self._rows(texts), samples,
                          seed, progress)

    def ar_nll(self, texts: str | Sequence[str], progress: Progress = silent) -> Likelihood:
        """-log p(texts) left to right under the causal rule, the output at n-1 predicting token n. Texts are cut at the
        model's context; `progress` is called with how many are done, and how many there are."""
        return likelihood(self.params, self.config, AR, None, self._rows(texts), progress=progress)

    def with_mask(self, mask: str = "new") -> "LanguageModel":
        """The model with a mask token: 'new', a token, or an id."""
        bundle, tokenizer = with_mask(self._bundle(), self.tokenizer, mask)
        return LanguageModel(bundle.config, bundle.params, bundle.card, tokenizer)

    def save(self, directory: str | Path) -> None:
        """Writes a native model directory, whole or not at all."""
        self._write(directory, write_native)

    def export(self, directory: str | Path, dtype: str | None = None) -> None:
        """Writes a Hugging Face directory for PyTorch, whole or not at all, in `float32` or `bfloat16` (by default as
        it is held)."""
        self._write(directory, functools.partial(write_hf, dtype=dtype))

    def encode(self, text: str) -> list[int]:
        """Start token and ids of a text. A model without a start token borrows its end token."""
        start = self.card.start_id
        return [*([] if start is None else [start]), *self.text_tokenizer().encode(text)]

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises `UserError` where there is none."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer files, so it cannot read or write text; copy its "
                            "tokenizer.json and tokenizer_config.json beside it")
        return self.tokenizer

    def _rows(self, texts: str | Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        texts = [texts] if isinstance(texts, str) else texts
        rows = texts_to_rows([self.encode(text)[:self.config.max_length] for text in texts])
        if not any(len(tokens) > 1 for tokens, _ in rows):
            raise UserError("no text has a token to predict; name longer texts")
        return rows

    def _bundle(self) -> Bundle:
        return Bundle(self.config, self.params, self.card)

    def _write(self, directory: str | Path, write: Any) -> None:
        with new_directory(directory) as partial:
            write(partial, self._bundle())
            if self.tokenizer is not None:
                self.tokenizer.save(partial)


def best_of(samples: Sequence[Sample]) -> Sample:
    """The sample with the best score, which has taken the passes of all of them."""
    best = max(samples, key=lambda sample: sample.score)
    return dataclasses.replace(best, forwards=sum(sample.forwards for sample in samples))


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, tokens: jax.Array, rule: Any, config: ModelConfig) -> jax.Array:
    return unembed(params, forward(params, tokens, config=config, rule=rule), config)


def load(source: str | Path) -> LanguageModel:
    """The model in a native, work or Hugging Face directory, of a hub id, or 'bundled' for the one in the package.

    Raises `UserError` with the cause where there is none, or where it is not whole.
    """
    bundle = open_bundle(source)
    card, tokenizer = bundle.card, open_tokenizer(bundle)
    if tokenizer is not None:  # a model that does not name its start and end has those of its tokenizer
        bos_id = tokenizer.bos_id if card.start_id is None else card.bos_token_id
        card = dataclasses.replace(card, bos_token_id=bos_id, eos_token_id=tokenizer.eos_id)
    return LanguageModel(bundle.config, jax.tree.map(jnp.asarray, bundle.params), card, tokenizer)
