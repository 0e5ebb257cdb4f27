"""What accelerators can do, by the kind that JAX calls them: for utilisation and for planning. Vendors' own figures."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of one JAX device: bf16 floating-point operations a second, bytes of memory, bytes a second from it, and bytes a
    second that it can send to its neighbours."""

    flops: float
    memory: float
    bandwidth: float
    links: float


GIB = 2**30
# A tpu7x chip is two devices; the other chips are one. Links: all directions of a chip together.
PEAKS = {
    "TPU v4": Peak(275e12, 32 * GIB, 1.228e12, 300e9),
    "TPU v5 lite": Peak(197e12, 16 * GIB, 0.819e12, 200e9),
    "TPU v5": Peak(459e12, 95 * GIB, 2.765e12, 600e9),
    "TPU v6 lite": Peak(918e12, 32 * GIB, 1.640e12, 448e9),
    "TPU7x": Peak(1155e12, 96 * GIB, 3.690e12, 600e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 80e9, 2.039e12, 300e9),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 80e9, 3.350e12, 450e9),
    "NVIDIA H200": Peak(989e12, 141e9, 4.800e12, 450e9),
}


def peak_of(kind: str) -> Peak | None:
    """The peak of a device kind, or None where it is not known."""
    return PEAKS.get(kind)
