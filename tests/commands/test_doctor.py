"""`dlm doctor` says what is here, survives what is broken, and names the command that mends it."""

import json
import subprocess

import pytest

from dlm_jax.commands import doctor
from dlm_jax.commands.main import main


def test_the_report_names_versions_devices_and_extras(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"dlm-jax", "python", "system", "jax", "devices"} <= report.keys()
    assert "1 x cpu" in report["devices"] or "x cpu" in report["devices"]
    assert {f"extra {name}" for name in doctor.EXTRAS} <= report.keys()


def answer(returncode=0, stdout="", stderr=""):
    return lambda *_, **__: subprocess.CompletedProcess([], returncode, stdout, stderr)


def hang(command, **kwargs):
    raise subprocess.TimeoutExpired(command, kwargs["timeout"])


@pytest.mark.parametrize("process,said", (
    (answer(1, stderr="Traceback\nRuntimeError: no CUDA driver\n"), "broken (RuntimeError: no CUDA driver)"),
    (answer(-9), "no reason given"), (hang, "another process may hold the device"),
    (answer(stdout="warning\n4|gpu|NVIDIA H200|150323855360\n"), "4 x NVIDIA H200 (gpu, 140 GiB each)")))
def test_a_device_that_is_broken_or_hangs_does_not_take_the_report_with_it(process, said):
    assert said in doctor.devices(process)


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "gguf" else "1")
    assert doctor.extra("gguf", "files") == "without gguf; for files: pip install 'dlm-jax[gguf]'"
    assert doctor.extra("torch", "exports") == "installed"


def test_the_packages_of_an_extra_are_those_that_it_asks_for(monkeypatch):
    requirements = ["jax>=0.10", "gguf<1,>=0.17; extra == 'gguf'", 'jax[tpu]<0.13; extra == "tpu"',
                    "jax[cuda13]>=0.10.2; extra == 'gpu'", "gcsfs; extra == 'gcs'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: requirements)
    assert [doctor.packages_of(name) for name in ("gguf", "tpu", "gpu", "gcs", "eval")] == [
        ["gguf"], ["libtpu"], ["jax-cuda13-plugin"], ["gcsfs"], []]


def test_every_extra_that_a_user_may_lack_is_explained():
    developers = {"test", "mutants", "notebooks", "docs", "maxtext"}
    known = {name for name in doctor.importlib.metadata.metadata(doctor.PACKAGE).get_all("Provides-Extra")}
    assert known - developers == doctor.EXTRAS.keys()
