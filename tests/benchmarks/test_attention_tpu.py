"""What the TPU benchmark reads in the compiler's dump."""

import pytest


@pytest.fixture
def tpu_bundles(benchmark_modules):
    return benchmark_modules("tpu_bundles")


def dump(*bodies: tuple[int, int]) -> str:
    """A kernel as the compiler writes it: a loop around regions of (bundles, products), each after a short one."""
    lines, address = ["LB: loop body", "= control target key end"], 0

    def bundle(code: str, note: str = "") -> None:
        nonlocal address
        lines.append(f"{'0' if address == 0 else hex(address):>6} LB: > {{ %{address} = {code} }} {note}")
        address += 1

    bundle("smov 0", "/* Start region 1 :: Start region 2 */")
    for number, (bundles, products) in enumerate(bodies):
        bundle("vst [vmem] %v1  ;;  %2 = vmatpush.bf16.msra.mxu0 %v1", f"/* Start region 1{number} */")
        bundle("sbr.rel", f"/* End region 1{number} :: Start region 2{number} */")
        for at in range(1, bundles):
            code = "vmatmul.bf16.gmra.mxu0 %v1  ;;  %3 = vadd.f32 %v2, %v3" if at <= products else "vadd.f32 %v2, %v3"
            bundle(code, f"/* End region 2{number} */" if at == bundles - 1 else "")
    bundle("sfence", "/* Start/End empty region 3 :: End region 2 :: End region 1 */")
    return "\n".join(lines)


def test_bodies_are_the_innermost_regions_with_products(tpu_bundles):
    assert tpu_bundles.runs(dump((40, 16), (7, 0), (9, 2))) == [(40, 16), (9, 2)]


def test_bodies_are_named_by_their_order_and_their_products(tpu_bundles):
    kinds = tpu_bundles.kinds_of("ours", "")
    found = tpu_bundles.runs(dump((40, 16), (50, 16), (30, 8), (20, 4), (10, 2)))
    assert list(tpu_bundles.name_bodies(found, kinds).items()) == [
        ((8, False), 40), ((8, True), 50), ((4, True), 30), ((2, True), 20), ((1, True), 10)]
    for wrong in (found[1:], found[::-1], []):
        with pytest.raises(RuntimeError, match="expected bodies"):
            tpu_bundles.name_bodies(wrong, kinds)
