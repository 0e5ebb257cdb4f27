"""Documents packed into a row: which tokens belong together, which are a prompt, and which can be predicted.

`segments` numbers the documents of a row from 1, int [batch, length]; 0 is padding. In a record, the number of a prompt
token also carries `PROMPT_BIT`, so plain text and (prompt, answer) pairs share one format.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import struct
from dlm_jax.typing import Bool, Int, Int32, Segments

PROMPT_BIT = 2**30

PerToken = Int32[Any, "b n"]  # numpy or JAX; the batch may be 1


@struct.dataclass
class Documents:
    """Where each token is, and the bounds of its document."""

    index: PerToken  # of the token in the row
    start: PerToken  # index of the first token of its document
    end: PerToken  # one past the index of the last token of its document

    @property
    def positions(self) -> PerToken:
        """Position of each token inside its document, from 0."""
        return self.index - self.start

    def block(self, size: int) -> tuple[PerToken, PerToken]:
        """The block of `size` tokens that each token is in, as [begin, end). Blocks are counted from the start of the
        document, and its last block may be short."""
        begin = self.start + (self.index - self.start) // size * size
        return begin, self.index.__array_namespace__().minimum(begin + size, self.end)

    def two_streams(self, length: int) -> "Documents":
        """The documents of [noisy || clean], where these are the documents of a text of `length` tokens."""
        return Documents(*(jnp.concatenate([x, x + length], 1) for x in (self.index, self.start, self.end)))


def find_documents(length: int, segments: Segments | None = None, stream: int | None = None) -> Documents:
    """The documents of rows of `length` tokens: runs of equal `segments`, or one document per row without segments.

    stream: tokens per stream of a two-stream input (default: `length`). A document never crosses from one stream into
    the other. Without segments the result is numpy, and static.
    """
    stream = stream or length
    index = np.arange(length, dtype=np.int32)[None]
    if segments is None:
        return Documents(index, index // stream * stream, index // stream * stream + stream)
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = changes | (index % stream == 0)
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    last = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(last, index + 1, length), axis=1, reverse=True)
    return Documents(index + jnp.zeros_like(start), start, end)  # adding zeros takes over the sharding of the segments


def predictable(segments: Segments) -> Bool[jax.Array, "b n"]:
    """Which tokens can be predicted.

    Padding cannot, and neither can the first token of a document, because nothing precedes it.
    """
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    return same & (segments > 0)


def split_prompt_bit(segments: Segments) -> tuple[Int[Any, "b n"], Bool[Any, "b n"]]:
    """Recorded segments as document numbers, and which tokens are a prompt."""
    return segments % PROMPT_BIT, segments >= PROMPT_BIT
