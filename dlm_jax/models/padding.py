"""Padding lengths and batches to few distinct sizes, so that few shapes are compiled."""


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
