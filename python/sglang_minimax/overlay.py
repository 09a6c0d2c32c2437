"""Lays the modules under ``python/sglang`` over the installed engine, in every process of an environment.

A ``.pth`` line runs :func:`install` when Python starts. It puts one finder in front of ``sys.meta_path``
and imports nothing else, so a process that never imports ``sglang`` pays for this small file only.
When ``sglang`` is imported, the finder asks the other finders where the engine is, checks its version,
and puts our folder in front of ``sglang.__path__``. The packages below it are namespace packages, so
Python itself then takes ``sglang.srt.models.minimax_m2`` from here and all the rest from the engine.

No file of the engine is touched. What the engine decides outside those modules (server arguments, a host
without a GPU) is adjusted by functions that run right after the engine's module was imported.

Environment:
    SGLANG_MINIMAX_OVERLAY=0    nothing is laid over and nothing is adjusted: the stock engine.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as typing's, without importing typing in every Python process
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

ENGINE_VERSION = "0.5.10.post1"

_WARNED = "SGLANG_MINIMAX_WARNED"  # tells child processes that the warning was given


def install() -> None:
    """Puts the finder in place. Called by the start-up line; calling it again changes nothing."""
    if os.environ.get("SGLANG_MINIMAX_OVERLAY", "1") == "0":
        return
    if any(isinstance(finder, EngineFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, EngineFinder())
    if "sglang" in sys.modules:
        _warn_once(
            "sglang-minimax lays nothing over the sglang of this process, which was imported before: the engine runs "
            "as it is. Import sglang_minimax.overlay and call install() first, or leave that to the start-up line."
        )


def is_active() -> bool:
    """Whether the ``sglang`` of this process is laid over."""
    engine = sys.modules.get("sglang")
    return engine is not None and folder() in list(engine.__path__)


def folder() -> str:
    """The folder that goes in front of ``sglang.__path__``: inside a wheel, or beside us in a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    packed = os.path.join(here, "laid_over", "sglang")
    return packed if os.path.isdir(packed) else os.path.join(os.path.dirname(here), "sglang")


class EngineFinder:
    """A ``sys.meta_path`` finder for ``sglang`` and for the engine's modules that are adjusted once imported."""

    def __init__(self) -> None:
        self.after_import: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "sglang":
            return self._lay_over(_find_elsewhere(self, name, path, target))
        if name in self.after_import:
            return self._adjust(_find_elsewhere(self, name, path, target), after=self.after_import[name])
        return None

    def _lay_over(self, spec: ModuleSpec | None) -> ModuleSpec | None:
        if spec is None or not spec.submodule_search_locations:
            return None
        found = engine_version(list(spec.submodule_search_locations))
        if found != ENGINE_VERSION:
            _warn_once(
                f"sglang-minimax lays nothing over sglang {found}: it supports sglang {ENGINE_VERSION}, "
                f"and this engine runs as it is. Install sglang=={ENGINE_VERSION}, or uninstall sglang-minimax."
            )
            return spec
        spec.submodule_search_locations.insert(0, folder())
        return self._adjust(spec, before=self._collect_adjustments)

    def _collect_adjustments(self) -> None:
        """When the engine is really imported: a program may ask where it is, and go on without it, or ask again."""
        from sglang_minimax import adjustments

        self.after_import.clear()
        for module, adjust in adjustments.for_this_host():
            self.after_import.setdefault(module, []).append(adjust)

    @staticmethod
    def _adjust(
        spec: ModuleSpec | None,
        before: Callable[[], None] | None = None,
        after: Iterable[Callable[[ModuleType], None]] = (),
    ) -> ModuleSpec | None:
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if before is not None:
                before()
            execute(module)
            for adjust in after:
                adjust(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def load_engine_module(name: str) -> ModuleType:
    """Executes the engine's own module ``name``, which one of ours stands in front of, and returns it.

    It keeps its name, so that what it defines pickles and logs as in the stock engine, but does not
    enter ``sys.modules``: that place is our module's.

    Raises:
        ModuleNotFoundError: no folder of the engine holds such a module.
    """
    import importlib.util

    engine = sys.modules["sglang"]
    relative = os.path.join(*name.split(".")[1:]) + ".py"
    for place in engine.__path__:
        path = os.path.join(place, relative)
        if place == folder() or not os.path.isfile(path):
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, f"{path} cannot be loaded as a module"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    raise ModuleNotFoundError(f"the engine's own {name} is in none of {list(engine.__path__)}", name=name)


def _find_elsewhere(
    finder: EngineFinder, name: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    """The spec that the other finders give, regular packages first.

    An editable install puts our ``python`` folder on ``sys.path``, where ``sglang`` looks like a namespace
    package; the engine may be known to a later finder only (an editable engine), so such a spec is passed over.
    """
    for other in sys.meta_path:
        find = getattr(other, "find_spec", None)
        if other is finder or find is None:
            continue
        spec: ModuleSpec | None = find(name, path, target)
        if spec is not None and spec.origin is not None:
            return spec
    return None


def engine_version(places: list[str]) -> str:
    """The engine's version: what stands beside its code, and only then what the environment's metadata says."""
    for place in places:
        try:
            with open(os.path.join(place, "_version.py"), encoding="utf-8") as stream:
                for line in stream:
                    if line.startswith("__version__ =") or line.startswith("version ="):
                        return line.rsplit("=", 1)[1].strip().strip("'\"")
        except OSError:
            continue
    from importlib import metadata

    for place in places:
        for distribution in metadata.distributions(name="sglang", path=[os.path.dirname(place)]):
            return distribution.version
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _warn_once(message: str) -> None:
    if os.environ.get(_WARNED) == "1":
        return
    os.environ[_WARNED] = "1"
    import warnings

    warnings.warn(message, RuntimeWarning, stacklevel=2)
