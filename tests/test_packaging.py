"""What ships and what is declared must be what is on the disk."""

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SHIPPED = ("nodes", "wan_core")


def test_packages_are_the_folders_with_code():
    folders = {file.parent.relative_to(ROOT) for top in SHIPPED for file in (ROOT / top).rglob("*.py")}
    on_disk = {"comfyui_wanflow"} | {"comfyui_wanflow." + ".".join(folder.parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_every_package_has_an_init():
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        assert ROOT.joinpath(*name.split(".")[1:], "__init__.py").is_file(), name


def test_requirements_are_the_dependencies_without_torch():
    requirements = (ROOT / "requirements.txt").read_text().split()
    dependencies = PROJECT["project"]["dependencies"]
    assert [d for d in dependencies if not d.startswith("torch")] == requirements
    assert any(d.startswith("torch>=") for d in dependencies)


def test_constraints_pin_every_dependency():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(d for group in extras.values() for d in group)]
    missing = {re.split(r"[<>=!~\[ ]", d)[0] for d in wanted} - set(pinned)
    assert not missing
    assert pinned["torch"] == "2.13.0"


def test_data_files_ship():
    """Every file under the data folders is covered by package-data, so that an installed `wanflow` finds it."""
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        covered = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
        tops = {pattern.split("/")[0] for pattern in patterns}
        data = {file for top in tops for file in (folder / top).rglob("*") if file.is_file()}
        data = {file for file in data if file.suffix not in (".py", ".pyc")}
        assert data and data == covered, package


def test_no_registry_is_chosen():
    """Which registry packages come from is the user's choice, never written here."""
    options = ("--index-url", "--extra-index-url", "--find-links")
    files = [ROOT / name for name in ("README.md", "README_zh.md", "pyproject.toml", "constraints.txt", ".ci/run")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not [option for option in options if option in text], file


def test_the_two_commands_are_the_same_everywhere():
    install_and_run = "pip install -c constraints.txt . && wanflow run example_workflows/api/quickstart.json"
    install_and_test = 'pip install -c constraints.txt -e ".[test]" && pytest'
    for name in ("README.md", "README_zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert install_and_run in text and install_and_test in text, name
    tested = (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install")
    assert install_and_test in tested
