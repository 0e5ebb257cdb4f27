"""Documents of any length into records of one length, with nothing thrown away."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def pack(documents: Iterable[Sequence[int] | np.ndarray], length: int, bos_id: int | None,
         eos_id: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents as [bos?] ids [eos?], one after the other, cut every `length` tokens: (tokens, segments), int32
    [length].

    `segments` numbers the documents inside a record from 1. A document may go on in the next record, where it is
    counted anew. Only the last record is padded: token 0, segment 0.
    """
    before, after = [np.array([] if token is None else [token], np.int32) for token in (bos_id, eos_id)]
    tokens, segments = np.zeros((2, length), np.int32)
    filled = segment = 0
    for ids in documents:
        document = np.concatenate([before, np.asarray(ids, np.int32), after])
        while document.size:
            taken = min(length - filled, document.size)
            segment += 1
            tokens[filled:filled + taken] = document[:taken]
            segments[filled:filled + taken] = segment
            document, filled = document[taken:], filled + taken
            if filled == length:
                yield tokens, segments
                tokens, segments = np.zeros((2, length), np.int32)
                filled = segment = 0
    if filled:
        yield tokens, segments
