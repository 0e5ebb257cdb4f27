"""Vendor peak figures of accelerators, by the device kind that JAX reports: for utilization (MFU) and for planning."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """Peak figures of one JAX device."""

    flops: float  # bf16 floating-point operations per second
    memory: float  # bytes
    bandwidth: float  # bytes per second from that memory
    interconnect_bandwidth: float  # bytes per second that it can send to its neighbors
    flops_per_cycle: int  # bf16 operations of its matrix units

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.flops / self.flops_per_cycle


GIB = 2**30
# A tpu7x chip is two devices; the other chips are one. Interconnect: all directions of a chip together.
DEVICE_SPECS = {
    "TPU v4": DeviceSpec(275e12, 32 * GIB, 1.228e12, 300e9, 2 * 4 * 2 * 128**2),
    "TPU v5 lite": DeviceSpec(197e12, 16 * GIB, 0.819e12, 200e9, 4 * 2 * 128**2),
    "TPU v5": DeviceSpec(459e12, 95 * GIB, 2.765e12, 600e9, 2 * 4 * 2 * 128**2),
    "TPU v6 lite": DeviceSpec(918e12, 32 * GIB, 1.640e12, 448e9, 4 * 2 * 256**2),
    "TPU7x": DeviceSpec(1155e12, 96 * GIB, 3.690e12, 600e9, 4 * 2 * 256**2),
    "NVIDIA A100-SXM4-80GB": DeviceSpec(312e12, 80e9, 2.039e12, 300e9, 108 * 2048),
    "NVIDIA H100 80GB HBM3": DeviceSpec(989e12, 80e9, 3.350e12, 450e9, 132 * 4096),
    "NVIDIA H200": DeviceSpec(989e12, 141e9, 4.800e12, 450e9, 132 * 4096),
}


def traced_device_kind() -> str:
    """The kind of device that the program is traced for. A mesh that names a device decides."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind


def device_spec(kind: str) -> DeviceSpec | None:
    """The figures of a device kind, or None for an unknown one."""
    return DEVICE_SPECS.get(kind)
