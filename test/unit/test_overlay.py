"""The overlay in processes of its own: what is laid over what, and when nothing is.

An environment is put together from folders: a stand-in for the engine, and the wheel's content or this checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sglang_minimax.overlay import ENGINE_VERSION, engine_version

REPOSITORY = Path(__file__).parents[2]
START_UP_LINE = (REPOSITORY / "python" / "sglang_minimax_startup.pth").read_text()

# What a process sees: where the engine's path leads, what a module of ours is and one of the engine's, and warnings.
LOOK = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sglang
    from sglang.srt.models import minimax_m2, other
print(json.dumps({
    "path": list(sglang.__path__), "minimax_m2": minimax_m2.WHOSE, "other": other.WHOSE,
    "warnings": [str(one.message) for one in caught], "modules": sorted(sys.modules),
}))
"""


def write_engine(folder: Path, version: str = ENGINE_VERSION) -> Path:
    """A package and namespace packages, like the engine: sglang, sglang.srt, sglang.srt.models."""
    models = folder / "sglang" / "srt" / "models"
    models.mkdir(parents=True)
    (folder / "sglang" / "__init__.py").write_text("")
    (folder / "sglang" / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    for name in ("minimax_m2", "other"):
        (models / f"{name}.py").write_text("WHOSE = 'engine'\n")
    return folder


def write_overlay(folder: Path, packed: bool) -> Path:
    """Our package with a stand-in for the model: as in a wheel (``packed``), or as in a checkout."""
    package = folder / "sglang_minimax"
    package.mkdir(parents=True)
    for name in ("__init__", "overlay"):
        (package / f"{name}.py").write_text((REPOSITORY / "python/sglang_minimax" / f"{name}.py").read_text())
    (package / "adjustments.py").write_text("def for_this_host():\n    return ()\n")
    models = (package / "laid_over" if packed else folder) / "sglang" / "srt" / "models"
    models.mkdir(parents=True)
    (models / "minimax_m2.py").write_text("WHOSE = 'overlay'\n")
    return folder


def run(code: str, *folders: Path, start_up: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Runs ``code`` in a bare Python with ``folders`` on its path, after the start-up line as ``site`` runs it.

    ``os`` is there first, as ``site`` has imported it by then.
    """
    prefix = f"import os, sys; sys.path[:0] = {[str(folder) for folder in folders]}\n"
    line = START_UP_LINE if start_up else ""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-S", "-c", prefix + line + code],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        timeout=60,
    )


def look(*folders: Path, **options) -> dict:
    process = run(LOOK, *folders, **options)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("packed", [True, False], ids=["wheel", "checkout"])
def test_our_module_stands_in_front_and_the_rest_is_the_engines(tmp_path, packed):
    engine, overlay = write_engine(tmp_path / "engine"), write_overlay(tmp_path / "ours", packed)
    for order in ([engine, overlay], [overlay, engine]):
        seen = look(*order)
        assert (seen["minimax_m2"], seen["other"]) == ("overlay", "engine")
        assert len(seen["path"]) == 2 and seen["path"][1] == str(engine / "sglang")
        assert seen["warnings"] == []


def test_an_engine_that_only_a_later_finder_knows(tmp_path):
    """An editable engine: its finder comes after the path finder, which meets our checkout's folder first."""
    engine, overlay = write_engine(tmp_path / "engine"), write_overlay(tmp_path / "ours", packed=False)
    editable = f"""
import importlib.util, sys
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "sglang":
            return importlib.util.spec_from_file_location(
                name, r"{engine}/sglang/__init__.py", submodule_search_locations=[r"{engine}/sglang"])
sys.meta_path.append(Editable)
"""
    process = run(editable + LOOK, overlay)
    assert process.returncode == 0, process.stderr
    seen = json.loads(process.stdout)
    assert (seen["minimax_m2"], seen["other"]) == ("overlay", "engine")


def test_switched_off(tmp_path):
    engine, overlay = write_engine(tmp_path / "engine"), write_overlay(tmp_path / "ours", packed=True)
    seen = look(engine, overlay, SGLANG_MINIMAX_OVERLAY="0")
    assert (seen["minimax_m2"], seen["other"], seen["path"]) == ("engine", "engine", [str(engine / "sglang")])


@pytest.mark.parametrize("version", ["0.5.10", "0.5.11", "0.5.10.post2.dev0+gabc", ENGINE_VERSION + "1"])
def test_another_engine_runs_as_it_is_with_one_warning(tmp_path, version):
    engine, overlay = write_engine(tmp_path / "engine", version), write_overlay(tmp_path / "ours", packed=True)
    seen = look(engine, overlay)
    assert (seen["minimax_m2"], seen["path"]) == ("engine", [str(engine / "sglang")])
    (warning,) = seen["warnings"]
    assert version in warning and ENGINE_VERSION in warning


def test_an_engine_whose_version_nothing_tells_runs_as_it_is(tmp_path):
    engine, overlay = write_engine(tmp_path / "engine"), write_overlay(tmp_path / "ours", packed=True)
    (engine / "sglang" / "_version.py").unlink()
    seen = look(engine, overlay)
    assert seen["minimax_m2"] == "engine" and "lays nothing over sglang of unknown version" in seen["warnings"][0]


def test_child_processes_do_not_warn_again(tmp_path):
    engine, overlay = write_engine(tmp_path / "engine", "0.5.11"), write_overlay(tmp_path / "ours", packed=True)
    child = START_UP_LINE + "import sglang"
    code = f"""
import subprocess, sys, sglang
child = "import sys; sys.path[:0] = {[str(engine), str(overlay)]}\\n" + {child!r}
sys.stderr.write(subprocess.run([sys.executable, "-S", "-c", child], capture_output=True, text=True).stderr)
"""
    process = run(code, engine, overlay)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("lays nothing over sglang 0.5.11") == 1


def test_without_an_engine_importing_sglang_fails_as_ever(tmp_path):
    overlay = write_overlay(tmp_path / "ours", packed=True)
    process = run("import sglang", overlay)
    assert "No module named 'sglang'" in process.stderr


def test_a_process_that_never_imports_sglang_imports_two_small_modules_more(tmp_path):
    overlay = write_overlay(tmp_path / "ours", packed=True)
    code = "import sys; print(*sorted(sys.modules))"
    with_line, without = (run(code, overlay, start_up=on).stdout.split() for on in (True, False))
    assert set(with_line) - set(without) == {"sglang_minimax", "sglang_minimax.overlay", "__future__"}


def test_each_adjustment_of_a_module_runs_once_after_the_engines_module(tmp_path):
    engine, overlay = write_engine(tmp_path / "engine"), write_overlay(tmp_path / "ours", packed=True)
    (overlay / "sglang_minimax" / "adjustments.py").write_text(
        "def adjust(module):\n    module.WHOSE += ' adjusted'\n"
        "def again(module):\n    module.WHOSE += ' twice'\n"
        "def for_this_host():\n    for one in (adjust, again):\n        yield 'sglang.srt.models.other', one\n"
    )
    assert look(engine, overlay)["other"] == "engine adjusted twice"


@pytest.mark.parametrize(
    "more",
    ["import sglang_minimax.overlay as ours; ours.install()", "import importlib, sglang; importlib.reload(sglang)"],
    ids=["installed twice", "engine reloaded"],
)
def test_an_adjustment_still_runs_once(tmp_path, more):
    """As where a program calls install() behind the start-up line."""
    engine, overlay = write_engine(tmp_path / "engine"), write_overlay(tmp_path / "ours", packed=True)
    (overlay / "sglang_minimax" / "adjustments.py").write_text(
        "def adjust(module):\n    module.WHOSE += ' adjusted'\n"
        "def for_this_host():\n    yield 'sglang.srt.models.other', adjust\n"
    )
    process = run(f"{more}\n{LOOK}", engine, overlay)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["other"] == "engine adjusted"


@pytest.mark.parametrize("line", ["__version__ = version = '1.2'", '__version__ = "1.2"', "version = '1.2'"])
def test_the_version_beside_the_engines_code_comes_before_the_environments(tmp_path, line):
    (tmp_path / "_version.py").write_text(f"# made by a tool\n__version_tuple__ = (0, 1)\n{line}\n")
    assert engine_version([str(tmp_path / "nowhere"), str(tmp_path)]) == "1.2"


def test_without_a_version_file_the_metadata_beside_the_engine_counts(tmp_path):
    """Which may be another than that of the environment's own engine."""
    metadata = tmp_path / "sglang-1.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 1.2\n")
    assert engine_version([str(tmp_path / "sglang")]) == "1.2"


def test_asking_where_the_engine_is_changes_nothing(tmp_path):
    """Libraries ask, and ask again, for what they support; only an import lays over, and adjusts once."""
    engine, overlay = write_engine(tmp_path / "engine"), write_overlay(tmp_path / "ours", packed=True)
    (overlay / "sglang_minimax" / "adjustments.py").write_text(
        "def adjust(module):\n    module.WHOSE += ' adjusted'\n"
        "def for_this_host():\n    import os\n    os.environ['ASKED'] = '1'\n"
        "    yield 'sglang.srt.models.other', adjust\n"
    )
    ask = """
import os
from importlib.util import find_spec
assert find_spec("sglang") and find_spec("sglang").origin
assert "ASKED" not in os.environ and "sglang_minimax.adjustments" not in sys.modules
"""
    process = run(ask + LOOK, engine, overlay)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["other"] == "engine adjusted"


def test_an_engine_that_was_imported_before_runs_as_it_is_with_one_warning(tmp_path):
    engine, overlay = write_engine(tmp_path / "engine"), write_overlay(tmp_path / "ours", packed=True)
    code = f"import sglang\n{START_UP_LINE}\nsglang_minimax.overlay.install()\n"
    process = run(code + "print(sglang_minimax.overlay.is_active())", engine, overlay, start_up=False)
    assert process.stdout.split() == ["False"], process.stderr
    assert process.stderr.count("lays nothing over the sglang of this process, which was imported before") == 1


def test_the_engines_own_module_behind_ours_can_be_loaded(tmp_path):
    engine, overlay = write_engine(tmp_path / "engine"), write_overlay(tmp_path / "ours", packed=True)
    code = """
import sys, sglang.srt.models.minimax_m2 as ours
from sglang_minimax.overlay import load_engine_module
theirs = load_engine_module("sglang.srt.models.minimax_m2")
print(ours.WHOSE, theirs.WHOSE, theirs.__name__, sys.modules["sglang.srt.models.minimax_m2"] is ours)
try:
    load_engine_module("sglang.srt.models.absent")
except ModuleNotFoundError as error:
    print(error.name)
"""
    process = run(code, engine, overlay)
    assert process.stdout.split() == [
        *("overlay", "engine", "sglang.srt.models.minimax_m2", "True"),
        "sglang.srt.models.absent",
    ], process.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = "from hatchling.build import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=REPOSITORY, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_brings_the_start_up_line_and_no_file_of_the_engine(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "sglang_minimax_startup.pth" in names
    assert "sglang_minimax/laid_over/sglang/srt/models/minimax_m2.py" in names
    tables = [name for name in names if name.endswith(".json")]
    assert len(tables) >= 2 and all("/laid_over/sglang/srt/layers/moe/" in name for name in tables), tables
    assert not [name for name in names if name.startswith("sglang/")]


@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_install_and_uninstall(wheel, tmp_path, editable):
    """In a fresh environment: laid over after the install, in child processes too, and stock after the uninstall."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    write_engine(Path(site) / "stand-in")
    (Path(site) / "engine.pth").write_text(str(Path(site) / "stand-in"))
    # The stand-in engine lacks what the real model imports, so where it would be found is what is looked at.
    child = "import importlib.util as u, sglang; print(u.find_spec('sglang.srt.models.minimax_m2').origin)"
    code = f"""
import multiprocessing, subprocess, sys
def origin(_):
    return subprocess.run([sys.executable, "-c", {child!r}], capture_output=True, text=True).stdout.strip()
{child}
print(origin(None))
"""

    def origins() -> list[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG", "PYTHON"))}
        seen = subprocess.run([python, "-c", code], capture_output=True, text=True, env=clean)
        assert seen.returncode == 0, seen.stderr
        return seen.stdout.split()

    stock = [str(Path(site) / "stand-in/sglang/srt/models/minimax_m2.py")] * 2
    assert origins() == stock
    source = ["--editable", str(REPOSITORY)] if editable else [str(wheel)]
    uv = [sys.executable, "-m", "uv", "pip"]
    build = ["--no-build-isolation-package", "sglang-minimax"] if editable else []
    hatchling = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__import__("hatchling").__file__))}
    subprocess.run(
        [*uv, "install", "-q", "--offline", "--no-deps", *build, "--python", str(python), *source],
        check=True, env=hatchling,
    )  # fmt: skip
    root = str(REPOSITORY / "python") if editable else f"{site}/sglang_minimax/laid_over"
    assert origins() == [f"{root}/sglang/srt/models/minimax_m2.py"] * 2
    subprocess.run([*uv, "uninstall", "-q", "--python", str(python), "sglang-minimax"], check=True)
    assert origins() == stock


def test_the_wheel_beside_the_real_engine(wheel, tmp_path):
    """In a fresh environment that sees this one's packages: the wheel's model is the one that the engine registers."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--offline", "--no-deps", "--python", str(python)]
    subprocess.run([*install, str(wheel)], check=True)
    import sglang  # only its place: this process may have another model in front

    engine = Path(sglang.__path__[-1]).parent
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "zz_engine.pth").write_text(f"{engine}\n")
    code = """
from sglang.srt.models.registry import ModelRegistry
model, name = ModelRegistry.resolve_model_cls(["MiniMaxM2ForCausalLM"])
import sys
print(name, sys.modules[model.__module__].__file__)
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG", "PYTHON"))}
    seen = subprocess.run([python, "-c", code], capture_output=True, text=True, env=clean, timeout=300)
    assert seen.returncode == 0, seen.stderr
    packed = site / "sglang_minimax/laid_over/sglang/srt/models/minimax_m2.py"
    assert seen.stdout.split()[-2:] == ["MiniMaxM2ForCausalLM", str(packed)]
