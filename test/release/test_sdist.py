"""What is in the source distribution, and that a wheel built from it is the wheel built from this tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from sglang_minimax import __version__

REPOSITORY = Path(__file__).parents[2]
ROOT = f"sglang_minimax-{__version__}"


def build(kind: str, tree: Path, out: Path) -> Path:
    code = f"from hatchling.build import build_{kind} as build; import sys; print(build(sys.argv[1]))"
    built = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, check=True, capture_output=True, text=True)
    return out / built.stdout.split()[-1]


@pytest.fixture(scope="module")
def littered(tmp_path_factory) -> Path:
    """A copy of this tree with what trials, tests and builds leave behind in it."""
    tree = tmp_path_factory.mktemp("tree") / "repository"
    junk = shutil.ignore_patterns(".git", ".venv", "dist", "__pycache__", ".*_cache", ".hypothesis", "shared")
    shutil.copytree(REPOSITORY, tree, ignore=junk)
    for name in (
        "test/small/model.safetensors",
        "benchmark/model.gguf",
        "scripts/server.log",
        "python/sglang_minimax/__pycache__/cli.cpython-311.pyc",
        "dist/sglang_minimax-0.0.9-py3-none-any.whl",
        "python/sglang_minimax-0.0.9-py3-none-any.whl",
        "test/unit/.pytest_cache/v",
        "test/.hypothesis/examples/1",
        ".venv/bin/python",
        "shared/notes.md",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"junk")
    return tree


@pytest.fixture(scope="module")
def sdist(littered, tmp_path_factory) -> Path:
    return build("sdist", littered, tmp_path_factory.mktemp("sdist"))


def names(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as files:
        members = files.getmembers()
    assert all(member.isfile() for member in members), "no link and no device belongs in it"
    return {str(PurePosixPath(member.name).relative_to(ROOT)) for member in members}


def test_it_has_what_a_person_needs_to_build_test_and_read(sdist):
    assert {
        "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "PKG-INFO", "pyproject.toml", "hatch_build.py",
        "constraints.txt", "mkdocs.yml", "docs/index.md", "scripts/demo.sh", "scripts/test.sh", "scripts/release.sh",
        "python/sglang/srt/models/minimax_m2.py", "python/sglang_minimax/overlay.py",
        "python/sglang_minimax_startup.pth", "test/unit/test_overlay.py",
    } <= names(sdist)  # fmt: skip


def test_it_has_nothing_that_git_does_not_have(sdist):
    """But for the metadata."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this tree is no git checkout")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split("\n")
    assert names(sdist) - set(known) == {"PKG-INFO"}


def test_it_has_no_checkpoint_wheel_or_leavings_of_a_test(sdist):
    ends = (".safetensors", ".gguf", ".bin", ".pt", ".whl", ".pyc", ".log", ".gz")
    folders = {"__pycache__", ".pytest_cache", ".hypothesis", ".venv", "dist", "shared"}
    for name in names(sdist):
        assert not name.endswith(ends) and not folders & set(PurePosixPath(name).parts), name
    assert sdist.stat().st_size < 3_000_000


def test_the_wheel_from_it_is_the_wheel_from_the_tree(sdist, tmp_path):
    with tarfile.open(sdist) as files:
        files.extractall(tmp_path, filter="data")
    (tmp_path / "from_tree").mkdir()
    wheels = build("wheel", tmp_path / ROOT, tmp_path), build("wheel", REPOSITORY, tmp_path / "from_tree")
    from_sdist, from_tree = (
        {name: archive.read(name) for name in archive.namelist()} for archive in map(zipfile.ZipFile, wheels)
    )
    assert from_sdist == from_tree
    assert any(name.endswith("licenses/LICENSE") for name in from_sdist)
    assert not [name for name in from_sdist if name.endswith((".pyc", ".safetensors", ".whl"))]
