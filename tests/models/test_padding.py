"""Padded sizes."""

from dlm_jax.models.padding import next_power_of_two


def test_the_next_power_of_two_is_the_smallest_one_that_is_not_below():
    powers = [2**i for i in range(12)]
    for n in range(1025):
        assert next_power_of_two(n) == min(power for power in powers if power >= n)
