"""The source distribution holds whatever a build needs, and a build without some of it stops."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tomllib
from setuptools import find_packages

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout: the package is installed")


def setup(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "setup.py", *arguments], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["dev", "docs", "ecosystem"])
def test_every_pin_has_its_hashes(name: str) -> None:
    """Else call ``make lock``."""
    pins = re.findall(r"^([\w.-]+==\S+)", (ROOT / f"requirements/{name}.in").read_text(), re.MULTILINE)
    hashed = re.findall(
        r"^([\w.-]+==\S+) \\\n    --hash=sha256:", (ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE
    )
    assert sorted(pin.lower().replace("_", "-") for pin in pins) == sorted(hashed)


def test_every_source_is_in_the_source_distribution(tmp_path: Path) -> None:
    run = setup(ROOT, "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path))
    assert run.returncode == 0, run.stderr
    (archive,) = tmp_path.glob("normfuse-*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.partition("/")[2] for name in files.getnames()}
    needed = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert {str(p.relative_to(ROOT)) for p in needed} <= held
    assert {"pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md", "normfuse/py.typed"} <= held
    assert not any(name.endswith(".so") for name in held)


@pytest.mark.parametrize("missing", ["cuda/*.cu", "cpu/*.cpp", "bindings.cpp"])
def test_a_build_without_sources_stops(tmp_path: Path, missing: str) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "normfuse").mkdir()
    shutil.copy(ROOT / "normfuse" / "__init__.py", tmp_path / "normfuse")
    for path in (tmp_path / "csrc").glob(missing):
        path.unlink()
    run = setup(tmp_path, "--version")
    assert run.returncode != 0 and "the source distribution is incomplete" in run.stderr


def test_only_the_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = find_packages(str(ROOT), **project["tool"]["setuptools"]["packages"]["find"])
    assert "normfuse.folding" in packages and all(name.partition(".")[0] == "normfuse" for name in packages)
