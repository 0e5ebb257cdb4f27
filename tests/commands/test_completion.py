"""The scripts complete commands and flags in the shells themselves."""

import shutil
import subprocess

import pytest

pytest.importorskip("shtab", reason="needs shtab: pip install 'dlm-jax[completion]'")

from dlm_jax.commands.completion import SHELLS
from dlm_jax.commands.main import main

ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD={last}; _shtab_dlm; echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize("words,expected", (("dlm self", "self-generate"), ("dlm export --la", "--layout"),
                                            ("dlm export --dtype q8", "q8_0")))
def test_bash_completes_commands_flags_and_choices(tmp_path, capsys, words, expected):
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    command = ASK.format(script=tmp_path / "script", words=words, last=len(words.split()) - 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert expected in done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_there_is_a_script_for_each_shell(capsys, shell):
    assert main(["completion", shell]) == 0
    assert "dlm" in capsys.readouterr().out
