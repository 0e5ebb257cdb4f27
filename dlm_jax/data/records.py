"""The format of a record and of the file that describes a dataset: what `prepare` writes and `Dataset` reads.

Tokenizer processes import this module, so it stays free of JAX.
"""

import numpy as np

FORMAT = 1
DESCRIPTION = "dataset.json"
Record = tuple[np.ndarray, np.ndarray]  # tokens and segments, int32 [length] each: see dlm_jax/segments.py


def encode_record(tokens: np.ndarray, segments: np.ndarray) -> bytes:
    """int32 tokens [length], then int32 segments [length], little-endian."""
    return np.stack([tokens, segments]).astype("<i4").tobytes()


def decode_record(record: bytes, length: int) -> Record:
    """The inverse of `encode_record`: (tokens, segments), int32 [length]. Raises `ValueError` for another length."""
    tokens, segments = np.frombuffer(record, "<i4").reshape(2, length).astype(np.int32)
    return tokens, segments
