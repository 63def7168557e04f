"""Which configuration a kernel runs with: a row that ``python -m fused_attn tune`` stored for this GPU, else `configs`.

The stored table is a JSON file in the user's cache folder, one for each kind of GPU and version of Triton. A row
replaces one configuration of the package's table for one kind of problem, so it never applies to a problem that was not
measured, nor after the package's table has changed. The file is read once, when the first problem on a GPU is planned.
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

#: What changes a kernel's loop, and with it the registers and shared memory that a tile needs. Sinks and grouped heads
#: act outside of it. The order is that of the names in a row.
FEATURES = ("causal", "window", "padding", "varlen", "mask", "bias", "relative_bias", "softcap", "dropout")


class Key(NamedTuple):
    """The problems that a row is for. head_dim is padded; replaces: the package's configuration for these problems."""

    kernel: str
    dtype_bytes: int
    head_dim: int
    features: tuple[str, ...]
    replaces: Config


class Row(NamedTuple):
    """The faster configuration, its time and that of the one that it replaces."""

    config: Config
    ms: float
    baseline_ms: float


class Table(NamedTuple):
    """about: device, capability, driver, versions and date of the measurement."""

    about: dict[str, object]
    rows: dict[Key, Row]


def choose(kernel: str, problem: AttentionProblem) -> Config:
    """The configuration to run `kernel` with."""
    config = configs.choose(kernel, problem)
    if _forced:
        return _forced.get(kernel, config)
    key = key_of(kernel, problem, config)
    table = _table_for(problem) if key is not None else None
    return table.rows[key].config if table is not None and key in table.rows else config


def key_of(kernel: str, problem: AttentionProblem, replaces: Config) -> Key | None:
    """None where no row can be for the problem: only equal widths of keys and values are measured, and no TF32."""
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
        "mask": problem.has_mask,
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
    """For measurements: plans made inside use `config` for `kernel`, and the package's table for the others."""
    _forced[kernel] = config
    try:
        yield
    finally:
        _forced.clear()


def table_of(device: int | None) -> Table | None:
    """The stored table for a GPU of this machine (None = the current one), or None.

    Warns, once in a process, where there is one that cannot be used.
    """
    return _read_table(torch.cuda.get_device_name(device))


def _table_for(problem: AttentionProblem) -> Table | None:
    if problem.device.type != "cuda" or not torch.cuda.is_available():
        return None
    # The problem may be about a GPU that is not in this machine: kernels are compiled ahead of time for others too.
    index = problem.device.index
    is_here = index is None or index < torch.cuda.device_count()
    if not is_here or problem.capability != torch.cuda.get_device_capability(index):
        return None
    return table_of(index)


@functools.cache
def _read_table(device_name: str) -> Table | None:
    path = path_of(device_name)
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
    """Where this platform keeps what a program can make again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fused_attn"


def path_of(device_name: str) -> Path:
    return folder() / f"{_slug(device_name)}-triton-{triton.__version__}.json"


def stored(device_name: str | None = None) -> list[Path]:
    """All tables in the cache folder, or those of one kind of GPU."""
    return sorted(folder().glob(f"{'*' if device_name is None else _slug(device_name)}-triton-*.json"))


def save(path: Path, table: Table) -> None:
    """Replaces the file as a whole, so that a process that reads it meanwhile sees the old or the new one."""
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
    """
    Raises:
        ValueError: the file is corrupt, or was written by another version of fused_attn or Triton.
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
    """The packages whose change makes a table worthless."""
    # Not by an import, since the package itself imports this module.
    return {"fused_attn": sys.modules["fused_attn"].__version__, "triton": triton.__version__}


def _parse_row(row: dict) -> tuple[Key, Row]:
    key = Key(row["kernel"], row["dtype_bytes"], row["head_dim"], tuple(row["features"]), Config(**row["replaces"]))
    return key, Row(Config(**row["config"]), float(row["ms"]), float(row["baseline_ms"]))


def _slug(device_name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
