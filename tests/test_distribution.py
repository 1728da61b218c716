"""The source distribution holds whatever a build needs, and a build without some of it stops."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tomllib
from setuptools import find_packages

import normfuse

ROOT = Path(__file__).parents[1]

in_the_repository = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="needs the repository")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout: the package is installed")


@pytest.mark.parametrize("name", ["dev", "docs", "ecosystem"])
def test_every_pin_has_its_hashes(name: str) -> None:
    """Else call ``make lock``."""
    pins = re.findall(r"^([\w.-]+==\S+)", (ROOT / f"requirements/{name}.in").read_text(), re.MULTILINE)
    hashed = re.findall(
        r"^([\w.-]+==\S+) \\\n    --hash=sha256:", (ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE
    )
    assert sorted(pin.lower().replace("_", "-") for pin in pins) == sorted(hashed)


def test_every_source_is_in_the_source_distribution(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (archive,) = tmp_path.glob("normfuse-*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.partition("/")[2] for name in files.getnames()}
    needed = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert {str(p.relative_to(ROOT)) for p in needed} <= held
    assert {"pyproject.toml", "setup.py", "CMakeLists.txt", "LICENSE", "README.md", "normfuse/py.typed"} <= held
    assert {"docs/architecture.md", "docs/norms.md", "mkdocs.yml", "tools/compat.sh", "SECURITY.md"} <= held
    assert not any(name.endswith(".so") for name in held)


@pytest.mark.parametrize("missing", ["cuda/*.cu", "cpu/*.cpp", "bindings.cpp"])
def test_a_build_without_sources_stops(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "normfuse").mkdir()
    shutil.copy(ROOT / "normfuse" / "__init__.py", tmp_path / "normfuse")
    for path in (tmp_path / "csrc").glob(missing):
        path.unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    with pytest.raises(SystemExit, match="the source distribution is incomplete"):
        runpy.run_path("setup.py", run_name="__main__")


def test_only_the_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = find_packages(str(ROOT), **project["tool"]["setuptools"]["packages"]["find"])
    assert "normfuse.folding" in packages and all(name.partition(".")[0] == "normfuse" for name in packages)


@in_the_repository
def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*(ROOT / ".github" / "workflows").glob("*.yml"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    named = {
        name for page in pages for name in re.findall(r"(?:run: |`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"test", "docs", "test-wheel", "compat", "sanitize"} <= named <= targets


@in_the_repository
def test_hooks_have_the_versions_of_the_pins() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements" / "dev.in").read_text(), re.MULTILINE))
    found = dict(re.findall(r"/([\w-]+)\n    rev: v(\S+)", hooks))
    assert found == {"ruff-pre-commit": pins["ruff"], "mirrors-clang-format": pins["clang-format"]}


@in_the_repository
def test_the_release_reads_the_version_of_the_package() -> None:
    """From the one place where it stands, by the command of the workflow."""
    (command,) = re.findall(
        r'"\$\((sed .*)\)" = "\$GITHUB_REF_NAME"', (ROOT / ".github/workflows/release.yml").read_text()
    )
    tag = subprocess.run(command, shell=True, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert tag.strip() == f"v{normfuse.__version__}"
    assert f"## {normfuse.__version__}" in (ROOT / "CHANGELOG.md").read_text()
