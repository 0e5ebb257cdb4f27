"""Finished sequences, and what they cost."""

import dataclasses
import html
import math
import resource
import sys

import jax


@dataclasses.dataclass(frozen=True)
class BatchCost:
    """The measured cost of a batch."""

    batch_nfe: int  # forward passes of the batch, prefill and caching of finished blocks included
    tokens: int  # tokens written in all its sequences
    seconds: float  # without compilation
    peak_bytes: int  # peak memory so far: of the first device if it reports it, otherwise of this process

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Sample:
    """A finished sequence. The lists have one entry per token of prompt and text; where the request stops at an end
    token, nothing after that token is kept."""

    tokens: list[int]
    commit_step: list[int]  # the denoising step, from 1, that committed each token; 0 for the prompt
    confidence: list[float]  # the model's probability of each token when it was committed; 0 for the prompt
    # Number of function evaluations: forward passes that this sequence took part in, prefill and caching of finished
    # blocks included. The same as if the sequence had been sampled alone.
    nfe: int
    text: str = ""  # the tokens as text; empty without a tokenizer
    cost: BatchCost = dataclasses.field(default=BatchCost(0, 0, 0.0, 0), compare=False)  # of its batch

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        """The text as a notebook shows it, or all fields where there is none."""
        return f"<pre>{html.escape(self.text)}</pre>" if self.text else f"<code>{html.escape(repr(self))}</code>"

    @property
    def new_tokens(self) -> int:
        """Number of tokens that the sampler wrote."""
        return sum(step > 0 for step in self.commit_step)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per forward pass of the sequence (TPF)."""
        return self.new_tokens / max(self.nfe, 1)

    @property
    def score(self) -> float:
        """The mean log probability, in nats, of the written tokens, each when it was committed."""
        log_p = [math.log(max(p, 1e-30)) for p, step in zip(self.confidence, self.commit_step) if step]
        return sum(log_p) / max(len(log_p), 1)


def peak_bytes() -> int:
    """Peak memory so far: of the first device if it reports it, otherwise of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
