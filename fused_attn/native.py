"""The compiled modules `fused_attn._C` and `fused_attn._cuda`: where one is missing, why, and what mends that."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def why_missing(module: str, needs: str, error: ImportError) -> str:
    """Why ``fused_attn.{module}``, which takes `needs` to build, could not be imported; a text for `explain`."""
    if not isinstance(error, ModuleNotFoundError):
        return f"fused_attn.{module} is there but cannot be loaded: {error}"
    if (other := _installed_copy(module)) is not None:
        return _where_imported(other)
    others = ", ".join(sorted(path.name for path in PACKAGE.glob(f"{module}.*")))
    if others:
        return (
            f"{PACKAGE} has been built for another Python than {sysconfig.get_config_var('SOABI')} ({others}); "
            "install fused_attn again with this one"
        )
    return (
        f"installed without fused_attn.{module}, whose sources need {needs}; with that on the PATH, install fused_attn "
        "again"
    )


def warn_of_sources() -> None:
    """Called where there are no kernels: a folder of sources that hides an installed package is nobody's intention."""
    if (other := _installed_copy("_C")) is not None:
        warnings.warn(f"fused_attn runs without its native kernels: {_where_imported(other)}", stacklevel=2)


def _where_imported(other: Path) -> str:
    return (
        f"Python has imported the sources in {PACKAGE}, which have not been built, instead of the installed package in "
        f"{other}; start Python in another folder, or install the sources in place with `pip install -e .`"
    )


def _installed_copy(module: str) -> Path | None:
    """The folder of the fused_attn that Python would import were it not for this one, if it has the module."""
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != PACKAGE.parent]
    package = PathFinder.find_spec("fused_attn", elsewhere)
    if package is None or package.origin is None:  # without an origin, a folder of that name
        return None
    compiled = PathFinder.find_spec(f"fused_attn.{module}", package.submodule_search_locations)
    return None if compiled is None else Path(package.origin).parent


try:
    import fused_attn._C as _C
except ImportError as error:
    # Installed without a C++ compiler, perhaps: everything else still works, and `info` shows this text.
    _C = None
    why_no_C = why_missing("_C", "a C++ compiler such as g++", error)
    warn_of_sources()
else:
    why_no_C = ""
