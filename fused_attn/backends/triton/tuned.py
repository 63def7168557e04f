"""The configuration that a kernel runs with: from a row that ``python -m fused_attn tune`` stored, else from `configs`.

The stored table is a JSON file in the user's cache folder, one for each kind of GPU and version of Triton. A row
replaces one configuration of `configs` for one kind of problem. So it never applies to a kind of problem that was not
measured, and no longer applies after that configuration of `configs` has changed. The file is read once, when the first
problem on a GPU is planned.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from fused_attn.attention.problem import UNBOUNDED, AttentionProblem
from fused_attn.backends.triton import configs
from fused_attn.backends.triton.configs import Config, padded_head_dim

#: The features of a problem that change the loop of a kernel, and so the registers and shared memory that a tile needs.
#: Sinks and head groups are missing, because the loop does not depend on them. A row lists names in this order.
FEATURES = ("causal", "window", "padding", "varlen", "mask", "bias", "relative_bias", "softcap", "dropout")


class Key(NamedTuple):
    """The problems that a row is for.

    head_dim: rounded up by `padded_head_dim`
    replaces: the configuration that `configs` had for these problems when the row was measured
    """

    kernel: str
    dtype_bytes: int
    head_dim: int
    features: tuple[str, ...]
    replaces: Config


class Row(NamedTuple):
    """The faster configuration, its milliseconds, and those of the configuration that it replaces."""

    config: Config
    ms: float
    baseline_ms: float


class Table(NamedTuple):
    """A stored table. about: device, capability, driver, versions and date of the measurement."""

    about: dict[str, object]
    rows: dict[Key, Row]


def choose(kernel: str, problem: AttentionProblem) -> Config:
    """The configuration that `kernel` runs with for this problem."""
    config = configs.choose(kernel, problem)
    if _forced:
        return _forced.get(kernel, config)
    key = key_of(kernel, problem, config)
    table = _table_for(problem) if key is not None else None
    return table.rows[key].config if table is not None and key in table.rows else config


def key_of(kernel: str, problem: AttentionProblem, replaces: Config) -> Key | None:
    """The key of a row for this problem, or None if `tune` does not measure such problems.

    It measures neither TF32 nor values whose padded head dim differs from that of keys.
    """
    head_dim = padded_head_dim(problem.head_dim)
    if padded_head_dim(problem.value_dim) != head_dim or problem.allows_tf32:
        return None
    return Key(kernel, problem.dtype.itemsize, head_dim, features_of(problem), replaces)


def features_of(problem: AttentionProblem) -> tuple[str, ...]:
    """Those of `FEATURES` that the problem has."""
    band = problem.band
    has = {
        "causal": band.left == UNBOUNDED and band.right != UNBOUNDED,
        "window": band.left != UNBOUNDED,
        "padding": problem.has_key_padding,
        "varlen": problem.is_packed,
        "mask": problem.has_mask or problem.num_ranges > 0,
        "bias": problem.has_bias,
        "relative_bias": problem.has_relative_bias,
        "softcap": problem.softcap > 0.0,
        "dropout": problem.dropout_p > 0.0,
    }
    return tuple(name for name in FEATURES if has[name])


#: Kernel -> configuration, while `forced` is in effect.
_forced: dict[str, Config] = {}


@contextlib.contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """For measurements: plans that are made inside use `config` for `kernel`, and `configs` for other kernels."""
    _forced[kernel] = config
    try:
        yield
    finally:
        _forced.clear()


def table_of(device: int | None) -> Table | None:
    """The stored table for a GPU of this machine, or None if there is none that can be used.

    device: the index of the GPU, or None for the current one

    Warns, once in a process, if a table is stored but cannot be used.
    """
    return _read_table(torch.cuda.get_device_name(device))


def _table_for(problem: AttentionProblem) -> Table | None:
    """The stored table for the GPU of a problem, or None."""
    if problem.device.type != "cuda" or not torch.cuda.is_available():
        return None
    # Kernels can be compiled ahead of time, so the GPU of the problem need not be in this machine.
    index = problem.device.index
    is_here = index is None or index < torch.cuda.device_count()
    if not is_here or problem.capability != torch.cuda.get_device_capability(index):
        return None
    return table_of(index)


@functools.cache
def _read_table(device_name: str) -> Table | None:
    """See `table_of`. The cache keeps the file from being read, and the warning from being given, more than once."""
    try:
        path = path_of(device_name)
    except RuntimeError:  # the user has no home folder, so nothing is stored
        return None
    try:
        if path.exists():
            return load(path)
        others = [other.name for other in stored(device_name)]
        reason = f"triton {triton.__version__} is installed; {', '.join(others)} is for another" if others else None
    except (OSError, ValueError) as error:
        reason = str(error)
    if reason is not None:
        warnings.warn(
            f"No tuned tile sizes for {device_name}, the package's own are used: {reason}. "
            "`python -m fused_attn tune` measures this GPU anew, `python -m fused_attn tune --clear` deletes what it "
            "stored.",
            stacklevel=2,
        )
    return None


def folder() -> Path:
    """The folder for stored tables: within the cache folder that the platform has for each user.

    Raises:
        RuntimeError: no variable of the environment names the cache folder, and the user has no home folder.
    """
    variable, within_home = (
        ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    )
    base = os.environ.get(variable)
    try:
        return Path(base or Path.home() / within_home) / "fused_attn"
    except RuntimeError as error:
        raise RuntimeError(f"tuned tables have no folder: expected {variable} or a home folder, got neither") from error


def path_of(device_name: str) -> Path:
    """The file of the table for a kind of GPU and the installed Triton."""
    return folder() / f"{_slug(device_name)}-triton-{triton.__version__}.json"


def stored(device_name: str | None = None) -> list[Path]:
    """The files of all tables in the cache folder, or of those for one kind of GPU, for any version of Triton."""
    return sorted(folder().glob(f"{'*' if device_name is None else _slug(device_name)}-triton-*.json"))


def save(path: Path, table: Table) -> None:
    """Stores the table. The file is replaced by a rename, so that a process that reads it at the same time gets the old
    table or the new one, never a part.
    """
    rows = [
        {
            **key._asdict(),
            "replaces": key.replaces._asdict(),
            "config": row.config._asdict(),
            "ms": row.ms,
            "baseline_ms": row.baseline_ms,
        }
        for key, row in table.rows.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({**table.about, "rows": rows}, indent=1) + "\n")
    unfinished.replace(path)


def load(path: Path) -> Table:
    """The table in the file `path`.

    Raises:
        ValueError: the file is damaged, or was measured with another version of fused_attn or Triton
        OSError: the file cannot be read
    """
    try:
        about = json.loads(path.read_text())
        rows = about.pop("rows")
        wrote = about["versions"]
        table = Table(about, dict(map(_parse_row, rows)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged, or other versions wrote its rows ({reason})") from error
    for package, version in versions().items():
        if wrote.get(package) != version:
            raise ValueError(f"{path} was measured with {package} {wrote.get(package)}, {version} is installed")
    return table


def versions() -> dict[str, str]:
    """The versions of the packages whose kernels or compiler a table depends on."""
    # fused_attn is not imported here, because it may be the importer of this module.
    return {"fused_attn": sys.modules["fused_attn"].__version__, "triton": triton.__version__}


def _parse_row(row: dict) -> tuple[Key, Row]:
    """A row of the JSON file, as `save` writes it."""
    key = Key(row["kernel"], row["dtype_bytes"], row["head_dim"], tuple(row["features"]), Config(**row["replaces"]))
    return key, Row(Config(**row["config"]), float(row["ms"]), float(row["baseline_ms"]))


def _slug(device_name: str) -> str:
    """The name of a GPU as a part of a file's name: "NVIDIA H100 PCIe" becomes "nvidia-h100-pcie"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
