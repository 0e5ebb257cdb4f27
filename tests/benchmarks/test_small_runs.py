"""Every benchmark runs to its end, here at a tiny size, and prints a table of sane numbers.

Those that train or compile several programs are marked slow.
"""

import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import pytest

import dlm_jax
from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.models.shapes import SHAPES

BUNDLED = Path(dlm_jax.__file__).parent / "assets" / "base"
LIBRARIES = {"claims_runs", "plain_samplers", "plain_torch", "tpu_bundles"}  # imported by the benchmarks


def rows(text: str, columns: int) -> list[list[str]]:
    """The body rows of all Markdown tables with so many columns."""
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")]
             for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, row in enumerate(cells) if all(re.fullmatch(":?-+:?", cell) for cell in row)]
    heads = {i - 1 for i in rules}
    return [row for i, row in enumerate(cells) if i not in heads and i not in rules and len(row) == columns]


def positive(*cells: str) -> bool:
    """Whether each cell begins with a finite number above zero."""
    found = [re.match(r"[+-]?[\d.]+(e[+-]?\d+)?", cell) for cell in cells]
    return all(number is not None and math.isfinite(float(number[0])) and float(number[0]) > 0 for number in found)


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def test_every_benchmark_has_a_test_here():
    benchmarks = {file.stem for file in (Path(__file__).parents[2] / "benchmarks").glob("*.py")}
    tested = set(re.findall(r'(?:main|printed)\(\s*"(\w+)"', Path(__file__).read_text()))
    assert tested == benchmarks - LIBRARIES


@needs("torch")
@pytest.mark.slow
def test_a_training_step_is_timed_on_both_sides_which_have_the_same_loss(printed):
    table = printed("train_step", "--pairs", 1, "--batch", 4, "--length", 16, "--shapes", "stories260k")
    assert [row[1] for row in rows(table, 6)] == ["one stream", "two streams, block 16"]
    assert all(positive(row[-1]) for row in rows(table, 6))


@needs("lm_eval")
@pytest.mark.slow
def test_a_base_is_fine_tuned_both_ways_and_scored_on_the_same_questions(printed, tmp_path):
    table = printed("finetune", "countdown", "--base", BUNDLED, "--workdir", tmp_path, "--steps", 2, "--train", 64,
                    "--test", 4, "--length", 64)
    assert [row[0] for row in rows(table, 5)] == ["ar", "hybrid_shifted"]
    assert all(positive(row[3]) for row in rows(table, 5))


@pytest.mark.slow
@pytest.mark.parametrize("task,shape", (("records", ("--shape", "64x2")), ("countdown", ())),
                         ids=("records", "countdown"))
def test_quality_against_speed_is_measured_over_seeds(printed, tmp_path, task, shape):
    table = printed("frontier", task, "--workdir", tmp_path, "--steps", 2, "--ar-steps", 2, "--train", 64, "--test", 3,
                    "--alone", 1, "--seeds", 2, "--strategies", "threshold:0.9,speculate:2", "--figure",
                    tmp_path / "frontier.png", *shape)
    found = rows(table, 7)
    assert [row[0] for row in found] == ["autoregressive", "threshold:0.9", "speculate:2"]
    assert all(positive(*row[2:]) for row in found) and found[0][4] == "1.00 ± 0.00"
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_the_cost_of_a_pass_is_measured_by_its_width(printed):
    table = printed("forward_width", "--models", 1, "--widths", 1, 4, "--passes", 2, "--rounds", 1)
    [row] = rows(table, 3)
    assert row[0] == "1.4M" and positive(*row[1:]) and row[1].endswith("(1.0x)")


@pytest.mark.slow
def test_what_a_reward_adds_is_measured_over_seeds(printed, tmp_path):
    table = printed("reinforce", "--base", BUNDLED, "--workdir", tmp_path, "--steps", 2, "--grpo-steps", 2, "--train",
                    64, "--test", 3, "--seeds", 1)
    assert [row[0] for row in rows(table, 4)] == ["autoregressive", *(f"{name}, {strategy}" for name in (
        "fine-tuned", "after GRPO") for strategy in ("threshold:0.9", "speculate", "speculate:4"))]
    assert all(row[1].endswith("%") and positive(row[3]) for row in rows(table, 4))


@pytest.mark.slow
def test_a_model_is_distilled_from_its_own_answers(printed, tmp_path, monkeypatch):
    monkeypatch.setattr("dlm_jax.training.rewards.reaches_target", lambda numbers, answer: True)  # none would be right
    table = printed("distill", "--base", BUNDLED, "--workdir", tmp_path, "--steps", 2, "--distill-steps", 2, "--train",
                    64, "--answers", 8, "--test", 3, "--seeds", 1, "--strategies", "threshold:0.9")
    assert [row[0] for row in rows(table, 3)] == [f"{name}, threshold:0.9" for name in (
        "fine-tuned", "own answers, certainty 0", "own answers, certainty 2")]
    assert all(positive(row[2]) for row in rows(table, 3))


@pytest.mark.slow
def test_a_base_is_converted_on_text_and_on_its_own(printed, texts, tmp_path):
    table = printed("own_text", "--base", BUNDLED, "--text", texts, "--validation", texts, "--workdir", tmp_path,
                    "--steps", 2, "--documents", 40, "--own-tokens", 64, "--prompts", 2, "--alone", 1, "--max-tokens",
                    8, "--seeds", 1, "--strategies", "speculate")
    found = rows(table, 6)
    assert [row[0] for row in found] == ["autoregressive", "converted on text, speculate",
                                         "converted on own text, speculate"]
    assert all(positive(*row[1:]) for row in found)


@needs("lm_eval")
@pytest.mark.slow
def test_base_adapted_and_from_scratch_are_evaluated_on_the_same_texts(printed, shared, tmp_path):
    table = printed("quality", "--base", shared / "stories260k", "--data", shared, "--workdir", tmp_path, "--steps", 2,
                    "--limit", 3, "--samples", 4, "--max-tokens", 16)
    assert [row[0] for row in rows(table, 7)] == ["base", "adapted", "from scratch"]
    assert all(positive(row[1], row[5], row[6]) for row in rows(table, 7))


def test_attention_on_a_cpu_is_timed_forward_and_with_gradients(printed):
    table = printed("attention_cpu", "--repeats", 1, "--shapes", "tiny_stories_blocks (stories260k)",
                    "next token (stories260k)")
    lines = [line.split(")")[1].split() for line in table.splitlines()[1:]]
    assert [line[0] for line in lines] == ["forward", "gradients", "forward"]
    assert all(positive(*line[1:]) for line in lines)


def test_attention_on_a_gpu_reports_that_there_is_none(printed):
    if jax.default_backend() == "gpu":
        pytest.skip("here is a GPU: run the benchmark itself")
    assert "There is no GPU here" in printed("attention_gpu")


def test_machine_code_for_a_gpu_is_read_or_its_compiler_is_missing(printed):
    table = printed("attention_gpu_compiled", "--rules", "causal", "--head-dims", 64, "--lengths", 1024)
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        assert table.startswith("Nothing to report") and "pip install" in table
    else:
        assert [row[2] for row in rows(table, 8)] == ["forward", "dQ", "dK, dV"]
        assert positive(*rows(table, 4)[0])


@needs("libtpu")
@pytest.mark.slow
def test_attention_is_compiled_for_a_tpu_and_compared(printed):
    table = printed("attention_tpu", "--chips", "v5e", "--lengths", 512)
    (waste,), calls = rows(table, 4), rows(table, 14)
    assert positive(*waste) and waste[0] == "512"
    assert calls and all(positive(*(cell for cell in row[:-4] if cell != "not installed")) for row in calls)
    assert all(cell in ("0.0", "not installed") or positive(cell) for row in calls for cell in row[-4:])  # memory


@pytest.mark.slow
def test_host_time_between_steps_is_measured(printed):
    table = printed("host", "--devices", 1, "--steps", 40, "--records", 256)
    assert [row[:2] for row in rows(table, 5)] == [["1", "empty"], ["1", "real"]]
    assert all(positive(row[4]) for row in rows(table, 5))
    assert positive(re.search(r"([\d.]+)M tokens", table)[1])


@needs("libtpu")
@pytest.mark.slow
def test_a_config_is_planned_for_its_pod(main, tmp_path):
    main("pods", "--only", "tiny", "--out", tmp_path / "pods.md", "--results", tmp_path / "results")
    (row,) = rows((tmp_path / "pods.md").read_text(), 15)
    assert row[:2] == ["tiny", "v5e:2x2 (4)"] and row[7] == "yes"
    assert positive(row[6], row[9], row[10])


@pytest.fixture
def pod_case(benchmark_modules, monkeypatch):
    """`pod_step` with one small case: (the module, the case)."""
    module = benchmark_modules("pod_step")
    case = module.Case("v5e-4", "tiny", "llama2-7b", 4, ("none", "full"), (("minimal", "shipped"), ("full", "sparse")))
    monkeypatch.setattr(module, "CASES", (case,))
    return module, case


@needs("libtpu")
@pytest.mark.slow
def test_our_step_on_a_pod_is_estimated(pod_case):
    module, case = pod_case
    found = module.our_step(case, "none")
    assert found["seconds"] == pytest.approx(sum(found["spent"].values())) and found["seconds"] > 0


def test_the_fastest_step_that_fits_is_shown_beside_the_fastest_of_the_other_side(pod_case, printed, tmp_path):
    for name, seconds, gib in (("ours_none_own", 1.0, 99), ("ours_full_own", 2.0, 9),
                               ("theirs_minimal_shipped", 5.0, 9), ("theirs_full_sparse", 4.0, 9)):
        spent = dict.fromkeys(("products", "kernels", "copies", "other", "waiting"), seconds / 5)
        (tmp_path / f"v5e-4_tiny_4_{name}.json").write_text(json.dumps(
            {"seconds": seconds, "spent": spent, "peak_gib": gib, "hidden": 0.5}))
    theirs, ours = rows(printed("pod_step", "--results", tmp_path), 12)
    assert theirs[1].endswith("full, sparse flags") and theirs[-2:] == ["4.000", "1.00"]
    assert ours[1].endswith("full, own flags") and ours[-2:] == ["2.000", "0.50"]


def test_a_causal_kernel_takes_the_blocks_on_and_below_the_diagonal(pod_case):
    module, case = pod_case
    model = SHAPES["meta-llama/Llama-2-7b-hf"]
    tiles = 10 / 2 * 4 * 32  # ten of sixteen blocks of 512 x 512, two of them a tile; four records, 32 heads
    assert module.splash_seconds("splash_mha_fwd", case, model, 1.0) == tiles * 2237
    assert module.splash_seconds("splash_mha_dq", case, model, 1.0) == tiles * 7168 / 2


@pytest.mark.slow
def test_a_base_is_converted_for_longer_by_recipes_that_can_and_cannot_verify(printed, texts, tmp_path):
    table = printed("longer", "--base", BUNDLED, "--text", texts, "--validation", texts, "--workdir", tmp_path,
                    "--recipes", "hybrid_shifted,bd3lm", "--steps", 2, "--documents", 40, "--beginnings", 2,
                    "--own-tokens", 64, "--rows", 2, "--prompts", 2, "--alone", 1, "--max-tokens", 8, "--strategies",
                    "threshold:0.9,speculate")
    found = rows(table, 8)
    assert [(row[0], row[2]) for row in found] == [("hybrid_shifted", "threshold:0.9"), ("hybrid_shifted", "speculate"),
                                                   ("bd3lm", "threshold:0.9")]
    assert all(positive(*row[3:]) for row in found)


@pytest.mark.slow
def test_selectors_are_compared_with_one_token_per_pass(printed, texts, tmp_path):
    adapt(load_config("tiny_stories_blocks", [f"data.train={texts}", f"data.validation={texts}", "train.steps=1",
                                              "data.validation_records=2", "data.seq_length=64"]), tmp_path / "run")
    table = printed("selection", tmp_path / "run", "--base", BUNDLED, "--validation", "python-stdlib", "--prompts", 3,
                    "--max-tokens", 8, "--selectors", "threshold:0.9,frechet:0.5")
    found = rows(table, 4)
    assert [row[0] for row in found] == ["confidence", "threshold:0.9", "frechet:0.5"]
    assert all(positive(row[1], row[3]) for row in found) and all("±" in row[2] for row in found[1:])


@pytest.fixture(scope="module")
def curves(main, texts, tmp_path_factory) -> Path:
    """The work directory of `adapt_or_scratch` after two steps."""
    workdir = tmp_path_factory.mktemp("curves")
    main("adapt_or_scratch", "--base", BUNDLED, "--train", texts, "--validation", texts, "--workdir", workdir,
         "--steps", 2, "--seq-length", 32)
    return workdir


@pytest.mark.slow
def test_objectives_are_compared_from_the_base_and_from_scratch(curves, printed, texts):
    table = printed("adapt_or_scratch", "--base", BUNDLED, "--train", texts, "--validation", texts, "--workdir", curves,
                    "--steps", 2, "--seq-length", 32)  # resumes: all runs are done
    found = rows(table, 4)  # validated at steps 0 and 2
    assert [row[1] for row in found] == ["base", "scratch"] * 2
    assert all(positive(*row[2:]) for row in found)
    assert (curves / "curves.png").stat().st_size > 0


@needs("torch")
@pytest.mark.slow
def test_samplers_are_timed_and_their_texts_judged(curves, printed, texts, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "def read(path): return the text of the file at the path"}\n')
    table = printed("sampling", "--base", BUNDLED, "--curves", curves, "--prompts", prompts, "--rounds", 1, "--batches",
                    1, "--figure", tmp_path / "sampling.png")
    assert len(rows(table, 5)) == 4 and all(positive(*row[2:]) for row in rows(table, 5))
    assert len(rows(table, 7)) == 14 and all(positive(*row[2:]) for row in rows(table, 7))
    assert [row[0] for row in rows(table, 4)] == ["none", "prefix", "dual"]
    assert (tmp_path / "sampling.png").stat().st_size > 0


def test_sampling_at_7b_reports_that_there_is_no_accelerator(printed):
    assert "no accelerator found" in printed("sampling_7b")


@pytest.mark.slow
def test_sampling_at_7b_can_be_tried_on_a_cpu(printed):
    table = printed("sampling_7b", "--anywhere", "--shape", "gpt2", "--length", 16, "--rounds", 1)
    assert len(rows(table, 4)) == 4 and all(positive(*row[1:]) for row in rows(table, 4))


@pytest.mark.slow
def test_a_claim_is_judged_and_reported(main, texts, tmp_path):
    main("claims", "--base", BUNDLED, "--train", texts, "--validation", texts, "--workdir", tmp_path, "--steps", 2,
         "--seeds", 1, "--records", 2, "--only", "adapted beats from scratch, two")
    report = (tmp_path / "claims.md").read_text()
    ((claim, measure, *values, verdict),) = rows(report, 6)
    assert (claim, measure, verdict) == ("adapted beats from scratch, two streams", "nelbo", "cannot tell")
    assert all(positive(value.removeprefix(name).strip())
               for value, name in zip(values, ("two same", "two same scratch")))
    assert (tmp_path / "claims.png").stat().st_size > 0


@pytest.mark.slow
def test_a_loss_is_extrapolated_over_tokens(printed, texts, tmp_path):
    table = printed("claims_tokens", "--base", BUNDLED, "--train", texts, "--validation", texts, "--workdir", tmp_path,
                    "--setup", "two same", "--steps", 1, 2, 3, "--records", 2)
    assert len(rows(table, 9)) == 3 and all(positive(*row[1:]) for row in rows(table, 9))
    assert re.search(r"NELBO = [\d.]+ \+ [\d.]+ \* \(tokens / 1M\)\^-[\d.]+ nats per token", table)


@needs("uvicorn")
@pytest.mark.slow
def test_a_server_is_loaded_in_three_ways_and_writes_the_same_texts(printed):
    table = printed("serve", BUNDLED, "--requests", 12, "--alone", 4, "--clients", 4, "--rows", 4, "--max-tokens", 16)
    assert [row[0] for row in rows(table, 5)] == ["one at a time", "whole batches", "continuous batching"]
    assert all(positive(*row[1:]) for row in rows(table, 5)) and "16 of 16 texts are the same" in table
