"""Writes the result tables of README.md from the rows in benchmarks/results: ``python benchmarks/report.py``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CPU_RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
BEGIN, END = "<!-- results:cpu -->", "<!-- /results:cpu -->"

MASKS = {
    "none": "no mask",
    "causal": "causal",
    "padded": "half padded",
    "causal+padded": "causal + padded",
    "bias": "bias with gradient",
}


def main() -> None:
    README.write_text(with_results(README.read_text(), rows_of(CPU_RESULTS)))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_results(readme: str, rows: list[dict]) -> str:
    """The README with the tables of these rows in place of the ones it has."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{cpu_tables(rows)}\n{END}{tail}"


def cpu_tables(rows: list[dict]) -> str:
    about = rows[0]
    shapes = sorted({tuple(row["shape"]) for row in rows if row["benchmark"] == "cpu"}, key=lambda s: (s[2], s[3]))
    dates = sorted({row["date"][:10] for row in rows})
    commits = sorted({row["commit"] for row in rows})
    lines = [
        f"Time of `F.scaled_dot_product_attention` divided by ours, on {about['cores']} cores of {about['device']} "
        f"({about['isa']}, {about['threads']} threads), torch {about['torch']}; commit {', '.join(commits)}, "
        f"{' to '.join(dates)}. Geometric mean [least, greatest] over (B, H, L, D) = {', '.join(map(str, shapes))}; "
        "above 1, ours is faster.",
        "",
        "| | " + " | ".join(MASKS.values()) + " |",
        "|---" * (len(MASKS) + 1) + "|",
    ]
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "forward+backward"):
            cells = [_ratio_cell(rows, dtype, direction, mask) for mask in MASKS]
            lines.append(f"| {dtype} {direction} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Peak extra memory of one call at (1, 4, 8192, 64), results included, ours / torch's, in MiB:",
        "",
        "| | " + " | ".join(MASKS.values()) + " |",
        "|---" * (len(MASKS) + 1) + "|",
    ]
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "forward+backward"):
            cells = [_memory_cell(rows, dtype, direction, mask) for mask in MASKS]
            lines.append(f"| {dtype} {direction} | " + " | ".join(cells) + " |")
    overhead = {
        (row["direction"], row["implementation"]): row["best_ms"] * 1e3
        for row in rows
        if row["benchmark"] == "cpu-overhead"
    }
    if overhead:
        kinds = dict.fromkeys(direction for direction, _ in overhead)
        parts = [f"{kind} {overhead[kind, 'fused_attn']:.1f} / {overhead[kind, 'torch']:.1f}" for kind in kinds]
        lines += [
            "",
            f"Per-call overhead at (1, 2, 4, 8), ours / torch's, best of many, in microseconds: {', '.join(parts)}.",
        ]
    return "\n".join(lines)


def _select(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _ratio_cell(rows: list[dict], dtype: str, direction: str, mask: str) -> str:
    chosen = _select(rows, benchmark="cpu", dtype=dtype, direction=direction, mask=mask, implementation="fused_attn")
    ratios = [row["ratio"] for row in chosen]
    return f"{statistics.geometric_mean(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def _memory_cell(rows: list[dict], dtype: str, direction: str, mask: str) -> str:
    case = {"benchmark": "cpu", "shape": [1, 4, 8192, 64], "dtype": dtype, "direction": direction, "mask": mask}
    ours, theirs = (
        _select(rows, **case, implementation=implementation)[0]["extra_mib"]
        for implementation in ("fused_attn", "torch")
    )
    return f"{ours:.0f} / {theirs:.0f}"


if __name__ == "__main__":
    main()
