"""What a sampler did, moment by moment, for those who draw it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from dlm_jax.sampling.trace import Callback, Trace


class Reader(Protocol):
    """The part of a tokenizer that is needed here."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        ...


@dataclasses.dataclass(frozen=True)
class Moment:
    """A text after a step, one entry a token: pieces, None where it is masked; order and confidence as in `Sample`."""

    pieces: list[str | None]
    order: list[int]
    confidence: list[float]

    @property
    def step(self) -> int:
        """The last step that wrote something."""
        return max(self.order, default=0)


class Recorder:
    """A callback that keeps every `Trace` it is told, and tells another one, where there is one."""

    def __init__(self, also: Callback | None = None) -> None:
        self.traces: list[Trace] = []
        self._also = also

    def __call__(self, trace: Trace) -> None:
        self.traces.append(trace)
        if self._also is not None:
            self._also(trace)

    def moments(self, reader: Reader, tokens: Sequence[int]) -> list[Moment]:
        """The history of the sequence that became `tokens`: from the bare canvas to the finished text, without the
        steps at which nothing was written."""
        final, n = np.asarray(tokens), len(tokens)
        row = next(i for i, ids in enumerate(self.traces[-1].tokens) if np.array_equal(ids[:n], final))
        given = np.asarray(self.traces[-1].order[row, :n]) == 0
        pieces = reader.pieces(tokens)
        found = [Moment([piece if there else None for piece, there in zip(pieces, given)], [0] * n, [0.0] * n)]
        for trace in self.traces:
            moment = moment_of(reader, trace, row, pieces, final)
            if moment != found[-1]:
                found.append(moment)
        return found


def moment_of(reader: Reader, trace: Any, row: int, pieces: Sequence[str], final: np.ndarray) -> Moment:
    """A sequence as a trace shows it. A token that was replaced later is read by itself."""
    n = len(final)
    ids, masked = trace.tokens[row, :n], trace.masked[row, :n]
    texts = [None if hidden else piece if token == last else reader.pieces([int(token)])[0]
             for hidden, piece, token, last in zip(masked, pieces, ids, final)]
    order = [0 if hidden else int(step) for hidden, step in zip(masked, trace.order[row])]
    return Moment(texts, order, [round(float(p), 4) for p in trace.confidence[row, :n]])
