"""The form of a record, and of the file that describes a dataset of them: what `prepare` writes and `Dataset` reads."""

import numpy as np

FORMAT = 1
DESCRIPTION = "dataset.json"


def encode_record(tokens: np.ndarray, segments: np.ndarray) -> bytes:
    """int32 tokens [length], then int32 segments [length], little-endian."""
    return np.stack([tokens, segments]).astype("<i4").tobytes()


def decode_record(record: bytes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `encode_record`: (tokens, segments), int32 [length]. Raises `ValueError` for another length."""
    tokens, segments = np.frombuffer(record, "<i4").reshape(2, length).astype(np.int32)
    return tokens, segments
