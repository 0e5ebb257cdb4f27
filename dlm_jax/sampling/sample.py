"""Finished sequences, and what they cost."""

import dataclasses
import math
import resource
import sys

import jax


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a batch cost, measured: `passes` of the model (prefill and the reading of finished blocks included) wrote
    `tokens` in `seconds`, without compilation. peak_bytes: the most memory held so far, of the device where it tells,
    else of this process."""

    passes: int
    tokens: int
    seconds: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Sample:
    """A finished sequence, one entry a token; after a committed end token nothing is kept where the request stops.

    order: the step at which a token was committed, from 1; 0 for given ones. confidence: the model's probability of a
    token when it was committed, 0 for given ones. forwards: passes of the model in which this sequence took part,
    prefill and the reading of finished blocks included; as many as if it were alone. text: the sequence as text, empty
    where there is no tokenizer. batch: what its batch cost.
    """

    tokens: list[int]
    order: list[int]
    confidence: list[float]
    forwards: int
    text: str = ""
    batch: Cost = dataclasses.field(default=Cost(0, 0, 0.0, 0), compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def new_tokens(self) -> int:
        """How many tokens the sampler wrote."""
        return sum(step > 0 for step in self.order)

    @property
    def tokens_per_forward(self) -> float:
        return self.new_tokens / max(self.forwards, 1)

    @property
    def score(self) -> float:
        """The mean log probability of the written tokens, each when it was committed."""
        written = [math.log(max(p, 1e-30)) for p, step in zip(self.confidence, self.order) if step]
        return sum(written) / max(len(written), 1)


def peak_bytes() -> int:
    """The most memory held so far: by the first device where it tells, else by this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
