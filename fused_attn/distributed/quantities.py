"""Numbers with units, as the command line takes them and prints them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_COUNTS = {"": 1, "K": 2**10, "k": 2**10, "M": 2**20, "G": 2**30}
_BANDWIDTHS = {
    f"{prefix}{symbol}/s": factor * size
    for prefix, factor in _DECIMAL.items()
    for symbol, size in (("B", 1.0), ("b", 0.125))  # bytes and bits
}
_SIZES = {f"{prefix}B": factor for prefix, factor in _DECIMAL.items()}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def _parser(kind: str, symbols: Mapping[str, float], example: str) -> Callable[[str], float]:
    """The function that reads a number with one of these symbols, for the argument ``type`` of argparse."""

    def parse(text: str) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\D*)", text.strip())
        if found is None or found[2] not in symbols:
            raise argparse.ArgumentTypeError(f"expected {kind} such as {example}, got {text!r}")
        return float(found[1]) * symbols[found[2]]

    return parse


_count = _parser("a number of at least 1", _COUNTS, "4096, 128K (K = 1024) or 4M (M = 1024 K)")
#: Bytes per second.
bandwidth = _parser("a bandwidth", _BANDWIDTHS, "450GB/s (bytes) or 400Gb/s (bits)")
#: Bytes.
size = _parser("a size", _SIZES, "80GB")
#: Seconds.
duration = _parser("a time", _TIMES, "12us")


def count(text: str) -> int:
    """A whole number of at least 1, with K for 1024 and M for 1024 K."""
    number = _count(text)
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(number)


def in_bytes(number: float) -> str:
    """ "1.5 GB"."""
    return _printed(number, "B")


def in_bandwidth(number: float) -> str:
    """ "450 GB/s"."""
    return _printed(number, "B/s")


def in_seconds(number: float) -> str:
    """ "1234 s", "1.2 s", "35 ms"."""
    if number >= 1e3:
        return f"{number:.0f} s"
    for symbol in ("s", "ms"):
        if number >= _TIMES[symbol]:
            return f"{number / _TIMES[symbol]:.3g} {symbol}"
    return f"{number / _TIMES['us']:.3g} us"


def _printed(number: float, symbol: str) -> str:
    prefix = next((x for x in reversed(_DECIMAL) if number >= _DECIMAL[x]), "")
    return f"{number / _DECIMAL[prefix]:.3g} {prefix}{symbol}"
