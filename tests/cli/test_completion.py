"""Shells complete commands and options with a script that the program prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = Path(sys.executable).with_name("convnext-export")


def complete(kind, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_CONVNEXT_EXPORT_COMPLETE": kind, **variables}
    return subprocess.run([PROGRAM], env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_program_prints_a_completion_script(shell):
    assert f"_CONVNEXT_EXPORT_COMPLETE={shell}_complete" in complete(f"{shell}_source")
    assert f"_CONVNEXT_EXPORT_COMPLETE={shell}_source" in (ROOT / "docs" / "quickstart.md").read_text()


def test_commands_and_options_are_completed():
    assert complete("bash_complete", COMP_WORDS="convnext-export ver", COMP_CWORD="1").split() == ["plain,verify"]
    options = complete("bash_complete", COMP_WORDS="convnext-export verify --sam", COMP_CWORD="2").split()
    assert options == ["plain,--samples"]
