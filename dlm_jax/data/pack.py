"""Packs documents of any length into records of one length, losing nothing."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dlm_jax.data.records import Record


def pack(documents: Iterable[Sequence[int] | np.ndarray], length: int, bos_id: int | None,
         eos_id: int | None) -> Iterator[Record]:
    """Concatenates the documents as [bos?] ids [eos?] and cuts every `length` tokens: (tokens, segments), int32
    [length].

    `segments` numbers the documents within a record from 1. A document may continue in the next record, where the
    numbering starts again. Only the last record is padded, with token 0 and segment 0.
    """
    prefix, suffix = [np.array([] if token is None else [token], np.int32) for token in (bos_id, eos_id)]
    tokens, segments = np.zeros((2, length), np.int32)
    filled = segment = 0
    for ids in documents:
        document = np.concatenate([prefix, np.asarray(ids, np.int32), suffix])
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
