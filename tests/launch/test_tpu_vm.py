"""launch/tpu_vm.sh against a stubbed Google Cloud."""

import shlex

import pytest

CONFIG = ("--config", "configs/tiny_stories.py", "--workdir", "gs://bucket/run")
ARGUMENTS = ("--name", "pod", "--zone", "us-central1-a", "--type", "v5e-16", *CONFIG)
BEGIN = ["scp", "ssh", "ssh", "ssh", "ssh"]  # ship; install, start, follow, status


def launch(world, *arguments):
    return world.run("tpu_vm.sh", *ARGUMENTS, *arguments)


def test_missing_machines_are_created_and_the_run_is_started(world):
    result = launch(world)
    assert result.code == 0, result.err
    assert result.verbs() == ["describe", "create", "describe", *BEGIN]
    create = result.calls[[call[4:5] for call in result.calls].index(["create"])]
    assert create[3:] == ["tpu-vm", "create", "pod", "--zone", "us-central1-a", "--version", "v2-alpha-tpuv5-lite",
                          "--accelerator-type", "v5litepod-16"]
    workers = [next(a for a in call if a.startswith("--worker")) for call in result.calls if "ssh" in call]
    assert workers == ["--worker=all", "--worker=all", "--worker=0", "--worker=0"]


def test_existing_machines_are_reused(world):
    world.state |= {"machines": "READY", "answers": ["gone", "0"]}
    assert launch(world).verbs() == ["describe", "ssh", *BEGIN]


def test_a_running_run_is_followed_and_not_started_twice(world):
    world.state |= {"machines": "READY", "answers": ["running", "0"]}
    result = launch(world)
    assert result.code == 0 and "already running" in result.err
    assert [command.split()[-1] for command in result.commands()] == ["status", "follow", "status"]


def test_the_remains_of_preempted_machines_are_deleted_first(world):
    world.state["machines"] = "PREEMPTED"
    assert launch(world).verbs()[:5] == ["describe", "delete", "describe", "create", "describe"]


def test_queued_spot_machines_are_requested_once_and_waited_for(world):
    world.state["queue"] = "ACTIVE"
    assert "create" not in launch(world, "--queued").verbs()
    world.state |= {"queue": None, "machines": None}
    result = launch(world, "--queued", "--spot", "--version", "my-image")
    create = next(call for call in result.calls if "create" in call)
    assert create[3:] == ["queued-resources", "create", "pod", "--zone", "us-central1-a", "--node-id", "pod",
                          "--runtime-version", "my-image", "--accelerator-type", "v5litepod-16", "--spot"]


def test_a_request_rejected_by_the_queue_ends_the_script(world):
    world.state["creations"] = ["FAILED"]
    result = launch(world, "--queued")
    assert result.code == 1 and "the queue rejected pod" in result.err


@pytest.mark.parametrize("queued", [(), ("--queued",)])
def test_after_a_preemption_the_run_resumes_on_new_machines(world, queued):
    """Even if there is no capacity at first."""
    world.state |= {"answers": ["PREEMPTED", "0"]}
    world.state["creations"] = ["ACTIVE" if queued else "READY", "STOCKOUT"]
    result = launch(world, "--restart", *queued)
    assert result.code == 0, result.err
    verbs = result.verbs()
    assert (verbs.count("create"), verbs.count("delete"), verbs.count("scp")) == (3, 1, 2)


def test_without_restart_a_preemption_is_an_error_that_names_the_flag(world):
    world.state["answers"] = ["PREEMPTED"]
    result = launch(world)
    assert result.code == 1 and "--restart" in result.err and result.verbs().count("create") == 1


def test_a_lost_connection_is_reestablished(world):
    world.state["answers"] = ["running", "", "running", "0"]
    result = launch(world)
    assert result.code == 0
    assert sum(command.endswith("follow") for command in result.commands()) == 4
    assert sum(" start " in command for command in result.commands()) == 1


@pytest.mark.parametrize("restart", [(), ("--restart",)])
def test_a_run_that_fails_on_its_own_is_not_restarted(world, restart):
    world.state["answers"] = ["3"]
    result = launch(world, *restart)
    assert result.code == 3 and result.verbs().count("scp") == 1


def test_a_failed_installation_ends_the_script(world):
    world.state["install"] = 1
    result = launch(world, "--restart")
    assert result.code == 1 and "could not be installed" in result.err


def test_an_unreachable_cloud_is_not_mistaken_for_missing_machines(world):
    world.state["offline"] = True
    result = launch(world)
    assert result.code == 1 and "no credentials" in result.err and "create" not in result.verbs()


def test_names_and_overrides_survive_quoting_through_every_shell(world):
    workdir, override = "gs://b/it's $HOME; rm *", '--config.train.note="a b"'
    result = world.run("tpu_vm.sh", "--name", "my pod", "--zone", "z", "--type", "v6e-8", "--config", CONFIG[1],
                       f"--workdir={workdir}", "--", override)
    assert all("my pod" in call or "my pod:dlm-jax.tar.gz" in call for call in result.calls if call[0] == "gcloud")
    start = next(command for command in result.commands() if " start " in command)
    assert shlex.split(start)[2:] == ["start", "dlm", "train", "--config", CONFIG[1], "--workdir", workdir,
                                      override]


def test_a_dry_run_prints_the_commands_of_a_real_run_in_order(world):
    dry = launch(world, "--spot", "--dry-run", "--", "--config.train.steps=10")
    assert (dry.code, dry.verbs(), world.state["machines"]) == (0, [], None)
    wet = launch(world, "--spot", "--", "--config.train.steps=10")
    shown = [shlex.split(line) for line in dry.out.splitlines()]
    ran = [call for call in wet.calls if call[0] == "gcloud" or "archive" in call]
    assert [[w for w in line if "tar.gz" not in w] for line in shown] == \
        [[w for w in line if "tar.gz" not in w] for line in ran]


@pytest.mark.parametrize("arguments, reason", [
    (("--type", "tpu7x-8"), "launch/gke_xpk.sh"),
    (("--type", "h100"), "unknown TPU type 'h100'"),
    (("--workdir", "runs/here"), "gs://"),
    (("--config", "missing.py"), "commit it"),
])
def test_an_impossible_request_is_rejected_before_anything_is_created(world, arguments, reason):
    result = launch(world, *arguments)
    assert result.code == 2 and reason in result.err and result.err.count("\n") == 1 and result.verbs() == []
