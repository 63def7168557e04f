"""The compiled modules: imports `fused_attn._C`, and explains why `_C` or `fused_attn._cuda` is missing.

`_C` is the compiled module, or None. `why_no_C` is the reason, with advice; an empty text if there is a module.
`why_stale` is the reason if the modules are there, but were built from other sources.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import sysconfig
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
#: Values of settings with which a build chooses by itself what it contains. All other values but OFF are lists.
_OPEN_VALUES = ("auto", "runnable", "all", "ON", "wheels")
WITH_COMPILER = "with that on the PATH, install fused_attn again"


def why_missing(module: str, needs: str, error: ImportError, remedy: str = WITH_COMPILER) -> str:
    """A text for users: why ``fused_attn.{module}`` could not be imported, and what to do about it.

    needs: the compiler that builds the module
    error: what the import has raised
    remedy: what to do if the package was installed without the module
    """
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
    return f"installed without fused_attn.{module}, whose sources need {needs}; {remedy}"


def build_settings() -> dict[str, str]:
    """The settings of the existing build that are not the default, by name; none if there is no compiled module."""
    built = _C or _stale
    return {} if built is None else dict(setting.split("=") for setting in built.build_info()["settings"].split())


def install_command(**needed: str) -> str:
    """A text for users: the command that builds the compiled modules and installs the package again.

    The command repeats the settings of the existing build, because pip forgets them.

    needed: what the new build must have, by the name of the setting: an entry, or several with commas. A setting that
        is a list gets them. A setting OFF is left out. A setting such as auto chooses one entry by itself, and is
        replaced if several are needed.
    """
    settings = build_settings()
    for name, entry in needed.items():
        value = settings.get(name, "auto")
        if value == "OFF":
            del settings[name]
        elif value in _OPEN_VALUES:
            if "," in entry:
                settings[name] = entry
        else:
            settings[name] = ",".join(dict.fromkeys((*filter(None, value.split(",")), *entry.split(","))))
    options = "".join(f" -C cmake.define.{name}={shlex.quote(value)}" for name, value in settings.items())
    root = PACKAGE.parent
    if (root / "pyproject.toml").exists():
        return f"`pip install -e {shlex.quote(str(root))}{options}`"
    return f"`pip install -e .{options}` in a clone of the repository"


def warn_of_sources() -> None:
    """Warns if Python has imported sources without kernels although an installed package has kernels.

    Python imports the package in the current folder before the installed one. Nobody wants the slow sources then.
    """
    if (other := _installed_copy("_C")) is not None:
        warnings.warn(f"fused_attn runs without its native kernels: {_where_imported(other)}", stacklevel=2)


def _where_imported(other: Path) -> str:
    """A text for users: this package hides the installed one in the folder `other`, and what to do about it."""
    return (
        f"Python has imported the sources in {PACKAGE}, which have not been built, instead of the installed package in "
        f"{other}; start Python in another folder, or install the sources in place with `pip install -e .`"
    )


def _installed_copy(module: str) -> Path | None:
    """The folder of another fused_attn on `sys.path` that contains the compiled module; None if there is none.

    Only the first other fused_attn counts, because Python would import that one if this one did not exist.
    """
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != PACKAGE.parent]
    package = PathFinder.find_spec("fused_attn", elsewhere)
    if package is None or package.origin is None:  # a folder of that name without __init__.py has no origin
        return None
    compiled = PathFinder.find_spec(f"fused_attn.{module}", package.submodule_search_locations)
    return None if compiled is None else Path(package.origin).parent


def _interface() -> str | None:
    """A hash of the sources that say how Python calls the modules; None if the sources are not beside the package.

    csrc/CMakeLists.txt computes the same hash for the build.
    """
    csrc = PACKAGE.parent / "csrc"
    if not (csrc / "python" / "inputs.h").exists():
        return None
    sources = [*csrc.glob("python/*.cpp"), *csrc.glob("python/*.h"), *csrc.glob("cuda/bindings.cpp")]
    try:
        hashes = sorted(hashlib.sha256(x.read_bytes()).hexdigest() for x in sources if not x.name.startswith("."))
    except OSError:  # an editor or git is writing one of them
        return None
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _why_stale(build_info: dict[str, Any]) -> str:
    """Why the compiled modules do not fit the sources beside them, with advice; an empty text if they fit.

    An editable install takes new Python files at once, as after ``git pull``, but keeps the modules until the next
    install. Their functions may then take other arguments than Python passes. Any change of these few sources counts,
    also that of a comment.
    """
    # An empty text stands for a build without CMake, as tests make them.
    if build_info.get("interface") == "" or _interface() in (None, build_info.get("interface")):
        return ""
    return (
        f"the sources in {PACKAGE.parent / 'csrc'} have changed since the native modules were built; "
        f"{install_command()} builds them again"
    )


#: The compiled module that does not fit the sources. Its settings are those with which to build again.
_stale: Any = None

try:
    import fused_attn._C as _C
except ImportError as error:
    # The package may have been installed without a C++ compiler. The other backends work, and `info` shows why_no_C.
    _C = None
    why_no_C = why_missing("_C", "a C++ compiler such as g++", error)
    why_stale = ""
    warn_of_sources()
else:
    why_no_C = why_stale = _why_stale(_C.build_info())
    if why_stale:
        _stale, _C = _C, None
        warnings.warn(f"fused_attn runs without its native kernels: {why_stale}", stacklevel=2)
