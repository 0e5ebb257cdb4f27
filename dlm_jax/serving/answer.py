"""The text of an answer as it grows: what each token adds, where to stop, and what may be sent already."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.sampling.lane import Job, Progress
from dlm_jax.sampling.sample import Sample

CONTEXT = 8  # tokens before a new one that decide how its text joins on
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the text of a token that only starts a character


class Token(NamedTuple):
    """A token of the answer."""

    piece: str
    log_p: float  # of the model when it committed it
    offset: int  # of the piece in the answer


class Answer:
    """One choice: the positions [first, last) of a request, as text."""

    def __init__(self, tokenizer: Tokenizer, job: Job, stops: Sequence[str]) -> None:
        masked = job.request.masked
        self.first, self.last = masked.index(True), len(masked) - masked[::-1].index(True)
        self.tokenizer, self.stops = tokenizer, stops
        self.tokens: list[Token] = []
        self.text = ""
        self.sent = 0  # characters that `new_text` has given
        self.reason: str | None = None  # why the answer has ended: 'stop' or 'length'
        self.forwards = 0

    def add(self, progress: Progress) -> None:
        """Takes in what has become settled."""
        trace, row, sample = progress.trace, progress.row, progress.sample
        end = min(len(sample.tokens) if sample else progress.settled, self.last)
        self.forwards = int(trace.nfe[row])
        begin = self.first + len(self.tokens)
        if self.reason is None and end > begin:
            start = max(begin - CONTEXT, 0)
            pieces = self.tokenizer.pieces(trace.tokens[row, start:end].tolist())[begin - start:]
            if sample or not pieces[-1].endswith(UNFINISHED):
                self._append(pieces, trace.confidence[row, begin:end].tolist())
        if sample and self.reason is None:
            self.reason = "stop" if len(sample.tokens) < self.last or self._ends(sample) else "length"

    def _append(self, pieces: Sequence[str], confidence: Sequence[float]) -> None:
        for piece, p in zip(pieces, confidence):
            self.tokens.append(Token(piece, math.log(max(p, 1e-30)), len(self.text)))
            self.text += piece
        cuts = [at for stop in self.stops if (at := self.text.find(stop, self.sent)) >= 0]
        if cuts:
            self.text, self.reason = self.text[:min(cuts)], "stop"

    def _ends(self, sample: Sample) -> bool:
        return self.tokenizer.eos_id is not None and sample.tokens[self.last - 1] == self.tokenizer.eos_id

    def new_text(self) -> str:
        """What can be sent and has not been: all but the beginning of what may turn out to be a stop."""
        end = len(self.text)
        if self.reason is None:
            end -= max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
                       default=0)
        new = self.text[self.sent:end]
        self.sent = max(self.sent, end)
        return new

    def shown(self) -> list[Token]:
        """The tokens of the text, without those that were cut off with a stop."""
        return [token for token in self.tokens if token.offset < len(self.text) or not token.piece]
