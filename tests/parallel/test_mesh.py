"""The same losses on any mesh of devices, in one process or several."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dlm_jax.errors import UserError
from dlm_jax.models.sharding import partition_spec
from dlm_jax.models.weights import weight_table
from dlm_jax.parallel.distributed import expected_processes, initialize
from dlm_jax.parallel.mesh import axis_size, constrain, global_batch, make_mesh, process_shard

LAUNCH = Path(__file__).parents[2] / "launch" / "local_processes.py"


def command(config: Path, workdir: Path, overrides: list[str]) -> list[str]:
    """A run of eight steps with a batch of eight records."""
    changes = ["train.global_batch_size=8", "train.grad_accum_steps=1", "train.steps=8", "checkpoint.every=4",
               "evaluate.every=8", "optimizer.schedule=constant", *overrides]
    return ["train", "--config", str(config), "--workdir", str(workdir), *(f"--config.{change}" for change in changes)]


def train(devices: int, arguments: list[str], compiled: Path) -> None:
    flags = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
             "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    done = subprocess.run([sys.executable, "-m", "dlm_jax", *arguments], env=os.environ | flags,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def metrics(workdir: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([[line["loss"], line["masked_loss"], line["gradient_norm"]] for line in lines])


@pytest.fixture(scope="module")
def alone(tiny_config, tiny_run, tmp_path_factory, compiled) -> np.ndarray:
    """The losses on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(1, command(tiny_config, workdir, tiny_run[:4] + tiny_run[6:]), compiled)
    return metrics(workdir)


STEPS = """
import contextlib, dataclasses, json, sys
import jax, numpy as np
from dlm_jax.config import load_config
from dlm_jax.parallel.mesh import global_batch, make_mesh
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.lora import with_mask_adapters
from dlm_jax.models.weights import init
from dlm_jax.training.step import init_state, make_step

model = ModelConfig(family="llama", vocab_size=64, width=16, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=24,
                    max_length=32, rope=Rope(), norm="rms", norm_eps=1e-5, mlp="swiglu", tied_head=False)
random = np.random.default_rng(0)
tokens = random.integers(0, 63, (3, 16, 32)).astype(np.int32)
segments = np.sort(random.integers(0, 4, (3, 16, 32)).astype(np.int32))

def losses(config, devices, shape):
    replica, fsdp, context, tensor = shape
    mesh = make_mesh(replica, fsdp, tensor, jax.devices()[:devices], context=context)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        state = init_state(jax.device_get(init(model, jax.random.key(0))), config, model)
        step = make_step(config, model, 63)
        for batch in zip(tokens, segments):
            state, metrics = step(state, *(global_batch(x, 16) for x in batch))
            yield [float(metrics[name]) for name in ("loss", "masked_loss", "gradient_norm")]

shapes = [(1, (1, 1, 1, 1)), (2, (1, 1, 1, 2)), (4, (2, 2, 1, 1)), (8, (1, -1, 1, 1)), (8, (2, 2, 1, 2)),
          (4, (1, 1, 4, 1)), (8, (1, 2, 2, 2))]
config = load_config(sys.argv[1], json.loads(sys.argv[2]))
model = with_mask_adapters(model, config.lora, 63)
print(json.dumps([list(losses(config, *each)) for each in shapes]))
"""


@pytest.mark.parametrize("changes", [pytest.param(["recipe.anneal_steps=4", "train.grad_accum_steps=2"],
                                                  marks=pytest.mark.slow, id="annealing"),
                                     pytest.param(["recipe=bd3lm", "recipe.block_size=8", "model.remat=full",
                                                   "train.grad_accum_steps=1"], marks=pytest.mark.slow, id="bd3lm"),
                                     pytest.param(["recipe=jacobi_forcing", "recipe.block_size=8", "recipe.ar_weight=5",
                                                   "train.grad_accum_steps=2"], marks=pytest.mark.slow, id="jacobi"),
                                     pytest.param(["recipe=hybrid_shifted", "recipe.block_size=8", "recipe.ar_weight=0",
                                                   "recipe.normalizer=masked", "train.grad_accum_steps=2",
                                                   "lora.rank=8", "lora.alpha=999", "lora.gated=true"],
                                                  marks=pytest.mark.slow, id="gated"),
                                     pytest.param([
                                         "recipe=hybrid_shifted", "recipe.block_size=8", "recipe.kl_weight=0.5",
                                         "recipe.normalizer=masked", "train.grad_accum_steps=2", "lora.rank=3"],
                                         marks=pytest.mark.slow, id="all of it")])
def test_every_mesh_gives_the_losses_of_one_device(changes, tiny_config):
    flags = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    changes = [*changes, "train.global_batch_size=16", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.01"]
    done = subprocess.run([sys.executable, "-c", STEPS, tiny_config, json.dumps(changes)], env=os.environ | flags,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, *meshes = json.loads(done.stdout)
    assert abs(alone[2][0] - alone[0][0]) > 0.01
    for mesh in meshes:
        np.testing.assert_allclose(mesh, alone, rtol=2e-4)
        np.testing.assert_allclose(mesh[0][:2], alone[0][:2], rtol=1e-6)  # of the same weights


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_devices(alone, tiny_config, tiny_run, tmp_path, compiled):
    for devices, steps in ((2, 3), (1, 5), (4, 8)):
        changes = tiny_run[:4] + tiny_run[6:] + [f"train.steps={steps}", "checkpoint.every=100"]
        train(devices, command(tiny_config, tmp_path / "run", changes), compiled)
    np.testing.assert_allclose(metrics(tmp_path / "run"), alone, rtol=2e-4)


@pytest.mark.slow
def test_two_processes_are_one_run(alone, tiny_config, tiny_run, tmp_path):
    arguments = command(tiny_config, tmp_path / "run", tiny_run[:4] + tiny_run[6:])
    done = subprocess.run([sys.executable, LAUNCH, "--processes", "2", "--devices-per-process", "2", "--",
                           sys.executable, "-m", "dlm_jax", *arguments],
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "process 1 of 2, 2 of 4 devices" in done.stdout + done.stderr
    np.testing.assert_allclose(metrics(tmp_path / "run"), alone, rtol=2e-4)


@pytest.mark.slow
def test_sigterm_ends_all_processes_at_the_same_step_and_they_resume_from_there(alone, tiny_config, tiny_run, tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    arguments = command(tiny_config, tmp_path / "run", tiny_run[:4] + tiny_run[6:])
    launch = [sys.executable, LAUNCH, "--processes", "2", "--devices-per-process", "1", "--grace", "60", "--",
              sys.executable, "-m", "dlm_jax"]
    with subprocess.Popen([*launch, *arguments, "--config.train.steps=100000", "--config.checkpoint.every=100000"],
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
    assert process.returncode == 143, output
    [step] = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert output.count(f"dlm: the run was asked to stop and is saved at step {step} in "
                        f"{tmp_path / 'run' / 'checkpoints'}; rerun the same command to resume") == 2
    done = subprocess.run([*launch, *arguments, f"--config.train.steps={int(step) + 2}"], capture_output=True,
                          text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = metrics(tmp_path / "run")
    assert len(found) == int(step) + 2
    np.testing.assert_allclose(found[:8], alone[:len(found)], rtol=2e-4)


def test_one_device_has_no_mesh_and_everything_is_a_no_op_without_one():
    assert make_mesh(1, -1, 1) is None
    x = np.arange(6).reshape(3, 2)
    assert constrain(x, "fsdp") is x and global_batch(x, 3) is x
    assert process_shard(8) == (0, 1) and axis_size("fsdp", "tensor") == 1


NORMS = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec
from dlm_jax.attention.dispatch import per_device
from dlm_jax.attention.qk_norm_tpu import norm_and_rotate_tpu
from dlm_jax.parallel.mesh import auto_sharded, make_mesh

random = np.random.default_rng(0)
q, k = (jnp.asarray(random.standard_normal((4, 32, heads, 128)), jnp.float32) for heads in (4, 2))
scales = [jnp.asarray(random.standard_normal(128), jnp.float32) for _ in range(2)]
angles = jnp.asarray(random.standard_normal((1, 32, 64)), jnp.float32)
kernel = functools.partial(norm_and_rotate_tpu, eps=1e-6, interpret=True)

def gradients(q, k, *scales):
    def loss(q, k, *scales):
        return sum(jnp.sum(jnp.sin(x)) for x in per_device(kernel, (q, k), angles, True, scales))
    return jax.grad(loss, (0, 1, 2, 3))(q, k, *scales)

alone = gradients(q, k, *scales)
for replica, fsdp, tensor, context in ((4, 1, 2, 1), (2, 2, 2, 1), (1, 2, 2, 2)):
    with jax.set_mesh(make_mesh(replica, fsdp, tensor, context=context)):
        found = jax.jit(auto_sharded(gradients, PartitionSpec()))(q, k, *scales)
    for a, b in zip(found, alone):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
"""


def test_the_kernel_of_queries_and_keys_has_the_same_gradients_in_every_mesh():
    flags = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "-c", NORMS], env=os.environ | flags,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("shape", [(3, 1, 1), (-1, -1, 1), (1, 0, 1), (2, -1, 1)])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(shape):
    with pytest.raises(UserError, match="does not make up the 1 devices"):
        make_mesh(*shape)


def test_a_weight_is_split_where_the_mesh_divides_it_and_replicated_elsewhere(random_model):
    config, _ = random_model("llama", vocab_size=32, heads=4, kv_heads=2, width=16, mlp_width=20)
    sizes = {"replica": 2, "fsdp": 4, "tensor": 4}
    specs = {path: partition_spec(path, w, sizes) for path, w in weight_table(config).items()}
    width = ("fsdp", "context")
    assert specs["embed.tokens"] == PartitionSpec("tensor", width)
    assert specs["layers.attention.q.weight"] == PartitionSpec(None, width, "tensor", None)
    assert specs["layers.attention.k.weight"] == PartitionSpec(None, width, None, None)  # 2 heads, 4 shards
    assert specs["layers.mlp.down.weight"] == PartitionSpec(None, "tensor", width)
    assert specs["layers.mlp_norm.scale"] == PartitionSpec()
    assert specs["head.weight"] == PartitionSpec(None, ("fsdp", "context", "tensor"))
    sizes["fsdp"] = 16
    assert partition_spec("head.weight", weight_table(config)["head.weight"], sizes) == PartitionSpec(width, "tensor")


@pytest.mark.parametrize("environment, count", [
    ({}, 1), ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1), ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, 4), ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 8),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, 2),
    ({"DLM_COORDINATOR": "127.0.0.1:1", "DLM_PROCESSES": "3", "DLM_PROCESS": "0"}, 3)])
def test_the_number_of_processes_follows_from_the_environment(environment, count):
    assert expected_processes(environment) == count
    if count == 1:
        initialize(environment)


def test_a_cluster_that_cannot_be_joined_is_refused():
    with pytest.raises(UserError, match="DLM_PROCESS must be a whole number, not ''"):
        initialize({"DLM_COORDINATOR": "127.0.0.1:1", "DLM_PROCESSES": "2"})
    jax.devices()  # JAX is in use from here on
    with pytest.raises(UserError, match="cannot join the other 1 of its cluster: .*; start all of them"):
        initialize({"DLM_COORDINATOR": "127.0.0.1:1", "DLM_PROCESSES": "2", "DLM_PROCESS": "0"})
