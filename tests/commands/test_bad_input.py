"""What the user can fix is reported in one sentence, with exit code 2, and nothing half-written is left."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dlm_jax.commands.main import main

pytestmark = pytest.mark.usefixtures("compiled_once")
TWO_STEPS = ["train.steps=2", "recipe.anneal_steps=0", "optimizer.warmup_steps=0"]  # as in the fixture `workdir`


@pytest.fixture
def checkpoint(base, tmp_path) -> Path:
    """A copy of the base, to be damaged."""
    return shutil.copytree(base, tmp_path / "checkpoint")


def left(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("arguments, words", [
    ([], "the following arguments are required: command; see `dlm --help`"),
    (["fly"], "invalid choice: 'fly'"),
    (["sample"], "the following arguments are required: model"),
    (["sample", "m", "--color", "red"], "unrecognized arguments: --color red; see `dlm"),
    (["sample", "m", "--max-tok", "3"], "unrecognized arguments"),
    (["sample", "m", "--seed", "-1"], "'-1' is not a whole number of at least 0"),
    (["sample", "m", "--max-tokens", "0"], "'0' is not a whole number of at least 1"),
    (["sample", "m", "--steps", "many"], "'many' is not a whole number"),
    (["sample", "m", "--temperature", "hot"], "invalid float value: 'hot'"),
    (["sample", "m", "--prompt", "\udcff"], "the text is not UTF-8"),
    (["sample", "m", "--config.train.steps=3"], "belongs to `dlm train`"),
    (["eval", "m", "--tasks", "guess", "--text", "x"], "--text is for nelbo and ar_nll"),
    (["eval", "m", "--tasks", "guess,", "--limit", "3"], "is not a list of tasks"),
    (["eval", "m", "--tasks", "nelbo", "--text", "x", "--limit", "-3"], "'-3' is not a whole number of at least 1"),
    (["prepare", "--text", "x", "--model", "m", "--length", "1", "--out", "o"], "not a whole number of at least 2"),
    (["import", "x", "--out", "o", "--dtype", "int4"], "invalid choice: 'int4'"),
    (["train", "--config", "c", "--workdir", "w", "--config.train.steps", "3"],
     "write --config.train.steps=VALUE"),
    (["sample", "/nowhere/at/all"], "there is no directory /nowhere/at/all"),
    (["sample", "/etc/hostname"], "/etc/hostname is a file"),
    (["import", "/nowhere", "--out", "o"], "there is no directory /nowhere"),
])
def test_a_wrong_call_is_explained(refused, arguments, words):
    assert words in refused(*arguments)


@pytest.mark.parametrize("flags, words", [
    (["--prompt", "the " * 80], "the model's context is 64"),
    (["--max-tokens", "100"], "the model's context is 64"),
    (["--unmasking", "alphabetical"], "'alphabetical' is not an unmasking strategy"),
    (["--unmasking", "threshold:high"], "write threshold:0.9"),
    (["--unmasking", "threshold:0.9+forget:1"], "'forget:1' is not a revision"),
    (["--unmasking", "diffullama_random:5"], "write diffullama_random"),
    (["--unmasking", "speculate"], "token_causal"),
    (["--cache", "block"], "for block_causal models"),
    (["--cache", "dual"], "number of positions per block"),
    (["--min-p", "2"], "min_p must lie in [0, 1]"),
    (["--stop", "the cat and the dog"], "is not one token of this tokenizer"),
    (["--prompt", "a <|mask|> b", "--max-tokens", "4"], "the mask token itself"),
    (["--prompts", "file.jsonl"], "--prompts FILE and --out FILE go together"),
    (["--prompts", "/nowhere.jsonl", "--out", "o.jsonl"], "cannot read /nowhere.jsonl"),
    (["--gif", "/nowhere/at/all.gif", "--max-tokens", "4"], "No such file or directory (/nowhere/at/all.gif)"),
    (["--unmasking", "threshold:2"], r"must lie in [0, 1]"),
    (["--temperature", "-1"], "temperature must be 0 or lie in"),
    (["--temperature", "nan"], "temperature"),
    (["--top-p", "0"], "top_p must lie in (0, 1]"),
])
def test_a_sample_that_cannot_be_drawn_is_refused(refused, workdir, flags, words):
    assert words in refused("sample", workdir, *flags)


def test_infilling_needs_a_hole_and_a_diffusion_model(refused, base, workdir):
    assert "no hole to fill" in refused("infill", workdir, "the cat")
    assert "cannot fill a hole" in refused("infill", base, "the [MASK:2] cat")


@pytest.mark.parametrize("hole, words", [("[MASK]", "no hole to fill"), ("[MASK:0]", "no hole to fill"),
                                         ("[MASK:6-2]", "minimum width above its maximum"),
                                         ("[MASK:1-99]", "context is 64"),
                                         ("[MASK:1-9] a [MASK:1-9]", "81 choices of widths and at most 64")])
def test_a_malformed_hole_is_refused(refused, workdir, hole, words):
    assert words in refused("infill", workdir, f"the {hole} mat")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage, words", [
    (lambda d: truncate(d / "model.safetensors"), "not a complete safetensors file"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "a pickle"),
    (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    (lambda d: (d / "config.json").unlink(), "has no config.json"),
    (lambda d: truncate(d / "config.json"), "cannot be read as JSON"),
    (lambda d: truncate(d / "tokenizer.json"), "tokenizer.json cannot be read as JSON"),
])
def test_a_damaged_model_is_not_imported(refused, checkpoint, tmp_path, damage, words):
    damage(checkpoint)
    assert words in refused("import", checkpoint, "--out", tmp_path / "out", "--mask", "new")
    assert left(tmp_path) == {"checkpoint"}


@pytest.mark.parametrize("flags, words", [
    (["--mask", "9999"], "not in the vocabulary"),
    (["--mask", "two words"], "is not one token"),
    (["--mask", "²"], "is not one token"),
    (["--recipe", "diffullama"], "name it with --mask"),
    (["--recipe", "alchemy", "--mask", "new"], "there is no recipe 'alchemy'; the recipes are"),
])
def test_an_import_that_makes_no_sense_is_refused(refused, base, tmp_path, flags, words):
    assert words in refused("import", base, "--out", tmp_path / "out", *flags)
    assert left(tmp_path) == set()


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", "holds no text"),
    ("blank.jsonl", b"\n\n", "holds no text"),
    ("latin.txt", "caf\u00e9".encode("latin-1"), "line 1 is not UTF-8"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    ("list.jsonl", b"[1]\n", "line 1 has no field 'text'"),
    ("bad.parquet", b"PAR1", "cannot read"),
])
def test_text_that_cannot_be_read_is_refused_and_leaves_nothing(refused, base, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    for command in (["prepare", "--model", base, "--length", 8, "--out", tmp_path / "out"],
                    ["eval", base, "--tasks", "ar_nll"]):
        assert words in refused(*command, "--text", tmp_path / name)
    assert left(tmp_path) == {name}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
                                  "generation_config.json", "SHA256SUMS"])
def test_a_pipe_among_the_files_of_a_model_is_refused_and_not_read(refused, checkpoint, tmp_path, name):
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    assert "is not a regular file" in refused("import", checkpoint, "--out", tmp_path / "out", "--mask", "new")
    assert left(tmp_path) == {"checkpoint"}


def test_a_pipe_instead_of_requests_results_or_text_is_refused_and_not_read(refused, workdir, base, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "x"}\n')
    for prompts, out in (("pipe", "out"), ("in.jsonl", "pipe")):
        assert "is not a regular file" in refused("sample", workdir, "--prompts", tmp_path / prompts, "--out",
                                                  tmp_path / out)
    assert "there is no file" in refused("prepare", "--model", base, "--length", 8, "--out", tmp_path / "out",
                                         "--text", tmp_path / "pipe")
    assert left(tmp_path) == {"pipe", "in.jsonl"}


@pytest.mark.parametrize("change, words", [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000, which is not a whole number from 1 to"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false', which is not true or false"),
    ({"rope_theta": True}, "rope_theta: True, which is not a number above 0"),
    ({"rope_theta": 1e300}, "rope_theta: 1e+300, which is not a number above 0 that fp32 can hold"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
     "the first must be the smaller one"),
    ({"rms_norm_eps": 7}, "rms_norm_eps: 7, which is not a number above 0 and at most 1"),
    ({"model_type": ["llama"]}, "model_type: ['llama'], which is not text"),
    ({"model_type": "llada"}, "block_type: None"),
])
def test_a_configuration_out_of_its_ranges_is_refused(refused, checkpoint, tmp_path, change, words):
    file = checkpoint / "config.json"
    fields = {name: value for name, value in json.loads(file.read_text()).items() if name != "rope_parameters"}
    file.write_text(json.dumps(fields | change))
    assert words in refused("import", checkpoint, "--out", tmp_path / "out")
    assert left(tmp_path) == {"checkpoint"}


def test_a_missing_text_file_is_refused(refused, base, tmp_path):
    assert "there is no file" in refused("prepare", "--model", base, "--length", 8, "--out", tmp_path / "out",
                                         "--text", tmp_path / "absent.txt")


def test_an_output_path_that_is_taken_or_unwritable_is_refused(refused, base, texts, tmp_path):
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "dear").write_text("keep me")
    file.write_text("a file")
    commands = (["import", base], ["export", base], ["prepare", "--model", base, "--length", 8, "--text", texts])
    for command in commands:
        assert "already exists and is not an empty directory" in refused(*command, "--out", taken)
        assert "already exists" in refused(*command, "--out", file)
        assert "cannot write" in refused(*command, "--out", file / "below")
        assert "cannot write" in refused(*command, "--out", "/proc/dlm/out")
    assert left(tmp_path) == {"taken", "file"} and left(taken) == {"dear"}


@pytest.fixture
def train(refused, tiny_config, tiny_run):
    """The sentence with which a run is refused."""
    def run(workdir: Path, *overrides: str, config: Path = tiny_config) -> str:
        return refused("train", "--config", config, "--workdir", workdir,
                       *(f"--config.{override}" for override in [*tiny_run, *overrides]))

    return run


@pytest.mark.parametrize("override, words", [
    ("train.stepz=3", "there is no key 'train.stepz'"),
    ("trian.steps=3", "there is no key 'trian'"),
    ("steps=3", "not of the form group.key=value"),
    ("train.steps=few", "train.steps must be of type int"),
    ("train.steps=0", "train.steps must be positive"),
    ("train.seed=-1", "train.seed must"),
    ("train.steps=" + "9" * 5000, "train.steps must be of type int"),
    ("recipe.anneal_steps=3000000000", "anneal_steps must not be negative, nor above"),
    ("recipe.block_size=1000000000", "block_size must lie between 0 and"),
    ("data.seq_length=1000000000", "data.seq_length must lie between 2 and"),
    ("log.stall=1e30", "log.stall must not be negative, nor above"),
    ("train.grad_accum_steps=3", "cannot be split into train.grad_accum_steps 3 equal micro-batches"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate must"),
    ("recipe.streams=2", "block_size must be at least 1 with two streams, not 0"),
    ("optimizer.decay_steps=5", "optimizer.decay_steps is for the schedule 'wsd'"),
    ("model.base=/nowhere", "there is no directory /nowhere"),
    ("model.mask=two words", "is not one token"),
    ("data.train=nowhere.txt", "data.train: there is no nowhere.txt"),
    ("data.validation=nowhere.txt", "data.validation: there is no nowhere.txt"),
])
def test_a_refused_run_leaves_no_work_directory(train, tmp_path, override, words):
    assert words in train(tmp_path / "run", override)
    assert left(tmp_path) == set()


def test_data_that_does_not_fit_the_model_is_refused(train, dlm, base, texts, checkpoint, tmp_path):
    dlm("prepare", "--text", texts, "--model", base, "--length", 65, "--out", tmp_path / "long")
    too_long = train(tmp_path / "run", f"data.train={tmp_path / 'long'}")
    assert "records of 65 tokens and the model reads at most 64" in too_long
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "was prepared with another tokenizer" in train(tmp_path / "run", f"model.base={checkpoint}")
    assert left(tmp_path) == {"long", "checkpoint"}


def test_a_failed_start_leaves_an_empty_directory_empty_and_data_of_another_start_is_not_reused(train, texts, tmp_path):
    (tmp_path / "run").mkdir()
    assert "there is no nowhere.txt" in train(tmp_path / "run", f"data.train={texts}", "data.validation=nowhere.txt")
    assert left(tmp_path / "run") == set()


@pytest.mark.parametrize("source, words", [
    ("def get_config():\n    return nothing\n", "line 2, NameError: name 'nothing' is not defined"),
    ("def get_config(:\n", "SyntaxError"),
    ("x = 3\n", "KeyError: 'get_config'"),
    ("import sys; sys.exit('bye')\n", "SystemExit: bye"),
    ("def get_config():\n    return {}\n", "must return an ml_collections.ConfigDict, not dict"),
])
def test_an_error_in_a_config_file_is_reported_with_its_line(train, tmp_path, source, words):
    config = tmp_path / "config.py"
    config.write_text(source)
    assert words in train(tmp_path / "run", config=config)


def test_a_missing_config_file_is_refused(train, tmp_path):
    assert "there is no config file" in train(tmp_path / "run", config=tmp_path / "absent.py")


def test_a_work_directory_of_something_else_is_left_alone(train, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear").write_text("keep me")
    assert "is not empty and holds no run" in train(tmp_path / "letters")
    assert "is a file" in train(tmp_path / "letters" / "dear")
    assert "Not a directory" in train(tmp_path / "letters" / "dear" / "below")
    assert "cannot continue" in train(Path("/proc/dlm/run"))
    assert left(tmp_path / "letters") == {"dear"}


def test_a_work_directory_of_another_run_is_left_alone(train, workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    refusal = train(workdir, "train.global_batch_size=2", *TWO_STEPS)
    assert "holds a run with train.global_batch_size = 4, not 2" in refusal
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_a_work_directory_without_or_with_a_damaged_checkpoint_is_refused(refused, workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    for file in copy.glob("checkpoints/2/params/manifest.ocdbt"):
        file.write_bytes(b"")
    assert "checkpoints/2 is damaged" in refused("sample", copy)
    shutil.rmtree(copy / "checkpoints" / "2")
    assert "has no checkpoint yet" in refused("sample", copy)


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def make(size: int) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.getuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root can make a small disk")
        return disk

    yield make
    if os.path.ismount(disk):
        subprocess.run(["umount", "-l", str(disk)], check=True)  # lazily: an exception may still hold a file open


@pytest.mark.parametrize("size", [4096, 12288, 28672])
def test_a_full_disk_is_reported_and_leaves_nothing(refused, base, texts, small_disk, size):
    disk = small_disk(size)
    for command in (["import", base], ["export", base], ["prepare", "--model", base, "--length", 8, "--text", texts]):
        assert "No space left on device" in refused(*command, "--out", disk / "out")
        assert left(disk) == set()


def test_a_disk_that_is_full_at_the_start_of_a_run_is_reported_and_leaves_nothing(train, small_disk):
    disk = small_disk(28672)
    assert "No space left on device" in train(disk / "run")
    assert left(disk) == set()


def test_a_disk_that_fills_during_a_run_is_reported_and_the_run_resumes_when_there_is_space(dlm, tiny_config, tiny_run,
                                                                                     small_disk):
    disk = small_disk(2**21)
    arguments = ["train", "--config", tiny_config, "--workdir", disk / "run", "--config.checkpoint.keep=40",
                 "--config.checkpoint.every=2", *(f"--config.{o}" for o in tiny_run if "checkpoint" not in o)]
    result = dlm(*arguments)
    sentence = result.err.splitlines()[-1]
    assert result.code == 2 and "No space left on device" in sentence and "Traceback" not in result.err, result.err
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert main([str(argument) for argument in arguments]) == 0
    steps = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))
