"""The history of a sample, moment by moment, for live views, GIFs and pages."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.trace import Callback, Trace


class PieceTokenizer(Protocol):
    """The part of a tokenizer that is needed here."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text."""
        ...


@dataclasses.dataclass(frozen=True)
class Moment:
    """A text after a step, one entry per token."""

    pieces: list[str | None]  # None where the token is masked
    commit_step: list[int]  # as in `Sample`
    confidence: list[float]  # as in `Sample`

    @property
    def step(self) -> int:
        """The last step that wrote a token; 0 if none has."""
        return max(self.commit_step, default=0)


def moment_at(pieces: Sequence[str], sample: Sample, seconds: float) -> Moment:
    """A sample, written in equal steps, as it stood after so many seconds of its own time; nothing was revised."""
    last = max(sample.commit_step)
    step = min(int(seconds / sample.cost.seconds * last), last)
    shown = [piece if commit <= step else None for piece, commit in zip(pieces, sample.commit_step)]
    return Moment(shown, [commit if commit <= step else 0 for commit in sample.commit_step], sample.confidence)


class Recorder:
    """A callback that keeps every `Trace`, and passes it on to another callback if there is one."""

    def __init__(self, also: Callback | None = None) -> None:
        self.traces: list[Trace] = []
        self._also = also

    def __call__(self, trace: Trace) -> None:
        self.traces.append(trace)
        if self._also is not None:
            self._also(trace)

    def moments(self, tokenizer: PieceTokenizer, tokens: Sequence[int]) -> list[Moment]:
        """The history of the sequence that became `tokens`: from the prompt alone to the finished text, without steps
        that wrote nothing."""
        final, n = np.asarray(tokens), len(tokens)
        row = next(i for i, ids in enumerate(self.traces[-1].tokens) if np.array_equal(ids[:n], final))
        is_prompt = np.asarray(self.traces[-1].commit_step[row, :n]) == 0
        pieces = tokenizer.pieces(tokens)
        prompt_only = [piece if shown else None for piece, shown in zip(pieces, is_prompt)]
        moments = [Moment(prompt_only, [0] * n, [0.0] * n)]
        for trace in self.traces:
            moment = moment_of(tokenizer, trace, row, pieces, final)
            if moment != moments[-1]:
                moments.append(moment)
        return moments


def moment_of(tokenizer: PieceTokenizer, trace: Trace, row: int, pieces: Sequence[str], final: np.ndarray) -> Moment:
    """Sequence `row` as a trace shows it. A token that was replaced later is decoded on its own.

    pieces, final: the finished text and its ids, int [n].
    """
    n = len(final)
    ids, masked = trace.tokens[row, :n], trace.masked[row, :n]
    shown = [None if hidden else piece if token == last else tokenizer.pieces([int(token)])[0]
             for hidden, piece, token, last in zip(masked, pieces, ids, final)]
    commit_step = [0 if hidden else int(step) for hidden, step in zip(masked, trace.commit_step[row])]
    return Moment(shown, commit_step, [round(float(p), 4) for p in trace.confidence[row, :n]])
