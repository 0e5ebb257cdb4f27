"""The container image: pinned versions that satisfy setup.py, files that exist, and no root."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "launch" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def declared():
    """The keywords that setup.py passes to setuptools."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", found.update)
        exec(compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"), {"__file__": ROOT / "setup.py"})
    return found


def test_every_requirement_has_a_version_that_satisfies_it(declared):
    lines = (DOCKER / "constraints.txt").read_text().split()
    pins = dict(line.split("==") for line in lines)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = declared["extras_require"]
    for text in [*declared["install_requires"], *extras["tpu"], *extras["gpu"], *extras["gcs"]]:
        requirement = Requirement(text)
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (text, version)


def test_the_image_is_pinned_and_runs_without_root():
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2 and all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base) for base in bases)
    last_stage = DOCKERFILE.rpartition("FROM ")[2]
    assert re.findall(r"^USER (\w+)", last_stage, re.MULTILINE) == ["1000"] and "pip" not in last_stage


def test_what_is_copied_exists_and_is_not_ignored():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists() and source in allowed
