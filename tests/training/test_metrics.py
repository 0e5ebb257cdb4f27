"""A log survives what happens to single lines of it."""

import json

from dlm_jax.training.metrics import JsonLines


def test_a_damaged_line_costs_no_other_line(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 3}).encode() for step in range(1, 8)]
    garbage = [b"\xff\x00\x80", b"[]", b'{"step": true}', b'{"step": "2"}', b'{"step": 2, "step": 3}', b"[" * 9999,
               b'{"step": NaN}', b"", lines[6][:9]]
    mixed = [each for pair in zip(garbage, [*lines, b"", b""], strict=True) for each in pair]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(mixed))
    log = JsonLines(tmp_path / "metrics.jsonl", 5)
    log.write({"step": 6, "loss": float("nan")})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == [*lines[:5], b'{"step": 6, "loss": null}']
