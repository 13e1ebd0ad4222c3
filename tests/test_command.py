"""The script `rlhf`: it starts ours, or says whose package stands in its place."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import rlhf_command

ROOT = Path(rlhf_command.__file__).parent


def rlhf(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", str(ROOT / "rlhf_command.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_our_own_packages_are_no_clash(tmp_path):
    done = rlhf(tmp_path, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("rlhf ")


@pytest.mark.parametrize("name", rlhf_command.PACKAGES)
@pytest.mark.parametrize("kind", ["module", "package"])
def test_a_module_of_the_working_folder_does_not_win(tmp_path, name, kind):
    if kind == "module":
        (tmp_path / f"{name}.py").write_text("raise SystemExit('theirs')")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('theirs')")
    done = rlhf(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", rlhf_command.PACKAGES)
def test_one_that_pythonpath_puts_first_is_named_with_its_folder(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise SystemExit('theirs')")
    done = rlhf(tmp_path, "--help", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"rlhf: Python imports the package {name} from {tmp_path / name}.py: remove that folder "
        "from PYTHONPATH, or rename the package there.\n"
    )


@pytest.mark.parametrize("name", ["tasks", "flows"])
def test_another_distribution_that_has_the_name_is_named(tmp_path, name):
    """As pip installs it: the package, and a folder that says whose it is."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    information = tmp_path / "celery_helpers-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: celery-helpers\n")
    (information / "RECORD").write_text(f"{name}/__init__.py,,\n")
    (information / "top_level.txt").write_text(f"{name}\n")
    done = rlhf(tmp_path, "--help", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"rlhf: The distribution celery-helpers also has a package {name}"
    )
    assert "uninstall it, or install rlhf-pipeline into a separate environment." in done.stderr


def test_one_that_is_missing_is_named():
    assert rlhf_command.clash(ROOT, ["no_such_package"]) == (
        "The package no_such_package is missing: reinstall rlhf-pipeline."
    )


@pytest.mark.parametrize("seconds", [0.2, 0.5, 1.0])
def test_ctrl_c_at_the_start_is_one_line(tmp_path, seconds):
    (tmp_path / "a.yaml").write_text("project: demo\n")
    process = subprocess.Popen(
        [sys.executable, "-P", str(ROOT / "rlhf_command.py"), "validate", "a.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "RLHF_HOME": str(tmp_path / "home")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "rlhf: Interrupted.\n")
