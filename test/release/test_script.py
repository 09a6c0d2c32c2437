"""scripts/release.sh on copies of this repository: what it refuses, and what it leaves where nothing is in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_minimax import __version__

REPOSITORY = Path(__file__).parents[2]
VERSION = "7.8.9"


def git(tree: Path, *arguments: str) -> str:
    me = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *me, *arguments], cwd=tree, check=True, capture_output=True, text=True)
    return done.stdout


def commit(tree: Path, message: str = "a change") -> None:
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", message)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A repository that can be released: the version, its dated entry, the tag.

    Two files are changed. The environment is the one of these tests, where the script would install the engine into
    one of its own; and in place of the wheel's test, which starts a server, stands one that looks which wheel it got.
    """
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this tree is no git checkout")
    copy = tmp_path / "repository"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()
    for name in names:
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    write(copy, "scripts/environment.sh", f"python={sys.executable}\n")
    wheel = f"dist/release/sglang_minimax-{VERSION}-py3-none-any.whl"
    looks = f"import os\ndef test_it():\n    assert os.environ['SGLANG_MINIMAX_WHEEL'] == os.path.abspath('{wheel}')\n"
    write(copy, "test/release/test_wheel.py", looks)
    edit(copy, "python/sglang_minimax/__init__.py", f'"{__version__}"', f'"{VERSION}"')
    edit(copy, "CHANGELOG.md", "## ", f"## {VERSION}, 2026-11-30\n\n- A change.\n\n## ")
    git(copy, "init", "--quiet")
    commit(copy)
    git(copy, "tag", f"v{VERSION}")
    return copy


def write(tree: Path, name: str, text: str) -> None:
    (tree / name).write_text(text)


def edit(tree: Path, name: str, old: str, new: str) -> None:
    text = (tree / name).read_text()
    assert old in text, f"{name} has no {old!r}"
    write(tree, name, text.replace(old, new, 1))


def release(tree: Path) -> subprocess.CompletedProcess:
    # Neither the index nor an isolated environment is needed: the tests' own hatchling builds.
    environment = {**os.environ, "UV_OFFLINE": "1", "UV_NO_BUILD_ISOLATION": "1"}
    script = ["bash", str(tree / "scripts/release.sh")]
    return subprocess.run(script, cwd=tree.parent, env=environment, capture_output=True, text=True, timeout=300)


def test_a_release(tree):
    done = release(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    built = sorted(path.name for path in (tree / "dist/release").iterdir() if path.name != ".gitignore")
    assert built == [f"sglang_minimax-{VERSION}-py3-none-any.whl", f"sglang_minimax-{VERSION}.tar.gz"]
    assert git(tree, "status", "--porcelain") == ""


def an_uncommitted_change(tree):
    write(tree, "README.md", "another")


def a_file_that_git_does_not_know(tree):
    write(tree, "python/sglang_minimax/forgotten.py", "")


def another_version(tree):
    edit(tree, "python/sglang_minimax/__init__.py", VERSION, "7.9.0")
    commit(tree)


def an_entry_without_a_date(tree):
    edit(tree, "CHANGELOG.md", f"## {VERSION}, 2026-11-30", f"## {VERSION}, not released yet")
    commit(tree)
    git(tree, "tag", "--force", f"v{VERSION}")


def a_commit_behind_the_tag(tree):
    write(tree, "README.md", "another")
    commit(tree)


def another_tag(tree):
    git(tree, "tag", "--delete", f"v{VERSION}")
    git(tree, "tag", "v0.0.1")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (an_uncommitted_change, "the working tree is not clean"),
        (a_file_that_git_does_not_know, "?? python/sglang_minimax/forgotten.py"),
        (another_version, f"the newest entry of CHANGELOG.md is '{VERSION}, 2026-11-30' and the version is 7.9.0"),
        (an_entry_without_a_date, f"is '{VERSION}, not released yet' and the version is {VERSION}"),
        (a_commit_behind_the_tag, f"HEAD has the tags '' and the version is {VERSION}: git tag v{VERSION}"),
        (another_tag, f"HEAD has the tags 'v0.0.1' and the version is {VERSION}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_refused(tree, spoil, message):
    spoil(tree)
    done = release(tree)
    assert done.returncode == 1
    assert done.stderr.startswith("no release: ") and message in done.stderr
    assert not (tree / "dist").exists(), "it is refused before anything is built"


def test_a_file_that_the_sdist_leaves_out_is_found(tree):
    edit(tree, "pyproject.toml", 'exclude = ["*.safetensors"', 'exclude = ["/python/sglang_minimax/demo.py", "*.x"')
    commit(tree)
    git(tree, "tag", "--force", f"v{VERSION}")
    done = release(tree)
    assert done.returncode == 1
    assert "no release: the wheel from the sdist and the one from the tree differ in " in done.stderr
    assert "sglang_minimax/demo.py" in done.stderr


def test_a_wheel_that_does_not_pass_its_test_is_no_release(tree):
    write(tree, "test/release/test_wheel.py", "def test_it():\n    assert False\n")
    commit(tree)
    git(tree, "tag", "--force", f"v{VERSION}")
    done = release(tree)
    assert done.returncode == 1 and "1 failed" in done.stdout
    assert "released" not in done.stdout
