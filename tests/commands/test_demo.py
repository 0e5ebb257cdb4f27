"""The demo, with fewer steps than `make demo` takes."""

import pytest

from dlm_jax.commands import demo, demo_records
from dlm_jax.config.named import config_file
from dlm_jax.errors import UserError
from dlm_jax.language_model import load

pytestmark = pytest.mark.usefixtures("optimized", "compiled_once")

SHORT = f"""
import runpy

def get_config():
    c = runpy.run_path({str(config_file(demo.CONFIG))!r})["get_config"]()
    c.train.steps, c.train.global_batch_size, c.train.grad_accum_steps = 40, 8, 1
    c.recipe.anneal_steps = c.optimizer.warmup_steps = 5
    c.data.validation_records = 16
    return c
"""


SHORT_RECORDS = f"""
import runpy

def get_config():
    c = runpy.run_path({str(config_file(demo_records.CONFIG))!r})["get_config"]()
    c.train.steps, c.optimizer.warmup_steps = 4, 2
    return c
"""


@pytest.mark.slow
def test_the_demo_adapts_fills_the_hole_exports_and_writes_json(tmp_path, monkeypatch):
    short = tmp_path / "short.py"
    short.write_text(SHORT)
    monkeypatch.setattr(demo, "CONFIG", short)
    records = tmp_path / "records.py"
    records.write_text(SHORT_RECORDS)
    for name, value in {"CONFIG": records, "AR_STEPS": 4, "TRAIN": 200, "TEST": 2, "MAX_TOKENS": 24}.items():
        monkeypatch.setattr(demo_records, name, value)
    result = demo.demo(tmp_path / "out")
    assert result["nelbo_after"] < result["nelbo_before"]
    assert 0 < result["tokens_per_forward"] <= 17 and result["times_faster"] > 0
    assert 0 <= result["exact"] <= 1 and 0 <= result["exact_ar"] <= 1
    filled = load(result["export"]).infill(demo.CODE).text
    before, after = demo.CODE.split("[MASK:10]")
    assert filled.startswith(before) and filled.endswith(after)


def test_the_demo_refuses_an_existing_directory(tmp_path):
    with pytest.raises(UserError, match="already exists"):
        demo.demo(tmp_path)
