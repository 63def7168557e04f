"""Writes the result tables and plots of README.md from benchmarks/results: ``python -m benchmarks report``."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import plots, summary  # noqa: E402
from benchmarks.conventions import OURS  # noqa: E402
from benchmarks.rows import Row, newest, read, select  # noqa: E402

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "benchmarks" / "plots"
CPU_RESULTS = RESULTS / "cpu.jsonl"

MASKS = {
    "none": "no mask",
    "causal": "causal",
    "padded": "half padded",
    "causal+padded": "causal + padded",
    "bias": "bias with gradient",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")


def main(arguments: argparse.Namespace) -> int:
    README.write_text(with_all_results(README.read_text(), RESULTS))
    if not arguments.no_plots:
        try:
            written = plots.draw_all(all_rows(RESULTS), PLOTS)
        except ImportError as error:
            print(f"no plots: {error} (pip install -e '.[benchmarks]')", file=sys.stderr)
            return 1
        print(*(path.relative_to(ROOT) for path in written), sep="\n")
    return 0


def all_rows(results: Path) -> list[Row]:
    """The newest of what several runs have measured; of a GPU those of its newest commit."""
    rows = newest(row for path in sorted(results.glob("*.jsonl")) for row in read(path))
    commits = {row["device"]: row["commit"] for row in sorted(rows, key=lambda row: row["date"]) if is_of_a_gpu(row)}
    return [row for row in rows if not is_of_a_gpu(row) or row["commit"] == commits[row["device"]]]


def is_of_a_gpu(row: Row) -> bool:
    return row["benchmark"] == "attention" and "driver" in row


def with_all_results(readme: str, results: Path) -> str:
    """The README with every generated block made from these rows."""
    rows = all_rows(results)
    readme = with_results(readme, [row for row in rows if row["benchmark"].split("-")[0] == "cpu"])
    readme = with_block(readme, "gpu", gpu_tables(rows))
    readme = with_block(readme, "memory", memory_tables(rows))
    return with_block(readme, "plots", plot_links(rows))


def with_results(readme: str, rows: list[Row]) -> str:
    """The README with the CPU tables of these rows in place of the ones it has."""
    return with_block(readme, "cpu", cpu_tables(rows))


def with_block(readme: str, name: str, content: str) -> str:
    begin, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    head, rest = readme.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{content}{content and chr(10)}{end}{tail}"


def plot_links(rows: list[Row]) -> str:
    folder = PLOTS.relative_to(ROOT).as_posix()
    return "\n\n".join(f"![{plot.title}]({folder}/{name}.png)" for name, plot in plots.plots_of(rows).items())


def memory_tables(rows: list[Row]) -> str:
    """For each device: memory of a training step at the longest L, how it grows, and the largest L if known."""
    rows = [row for row in rows if row["benchmark"].startswith("memory") and row["direction"] == "forward+backward"]
    tables = [_memory_table(group) for group in summary.groups(rows, ("device", "dtype"))]
    return "\n\n".join("\n".join(table) for table in tables)


def _memory_table(rows: list[Row]) -> list[str]:
    about = rows[0]
    batch, heads, _, head_dim = about["shape"]
    longest = max(row["shape"][2] for row in rows)
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = [
        f"Memory beyond inputs and results of forward + backward at (B, H, L, D) = ({batch}, {heads}, {longest}, "
        f"{head_dim}), {about['dtype']}, on {about['device']}, in MiB, and how it grows; a mask or dense bias that an "
        f"implementation must be given counts. torch {_all(rows, 'torch')}, commit {_all(rows, 'commit')}, "
        f"{_dates(rows)}.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for mask in dict.fromkeys(row["mask"] for row in rows):
        cells = [_growth_cell(select(rows, mask=mask, implementation=name), longest) for name in names]
        lines.append(f"| {plots.TITLES[mask]} | " + " | ".join(cells) + " |")
    return lines


def _growth_cell(rows: list[Row], longest: int) -> str:
    sizes = [row for row in rows if "extra_mib" in row]
    at_longest = [summary.mib_of(row) for row in sizes if row["shape"][2] == longest]
    if not at_longest:
        return "-"
    exponent = summary.growth_exponent([row["shape"][2] for row in sizes], list(map(summary.mib_of, sizes)))
    cell = f"{at_longest[0]:.0f}" + ("" if exponent is None else f", L^{exponent:.1f}")
    for row in rows:
        if "largest_length" in row:
            more = "or more " if row["stopped_by"] == "time" else ""
            cell += f", fits {row['largest_length']} {more}".rstrip()
    return cell


#: The other implementations that have a column of their own in the tables of GPUs, if there are rows of them.
COLUMNS = ("flash_attn4", "flash_attn3", "torch-cudnn", "torch")


def gpu_tables(rows: list[Row]) -> str:
    """One table for each GPU and dtype; nothing without rows of a GPU."""
    groups = summary.groups(list(filter(is_of_a_gpu, rows)), ("device", "dtype"))
    return "\n\n".join("\n".join(_gpu_table(group)) for group in groups if any(map(_ours, _cases(group))))


def _gpu_table(rows: list[Row]) -> list[str]:
    """A line for each head dim, mask and length, and in it each direction."""
    about = rows[0]
    timed = [row for row in rows if "median_ms" in row]
    columns = {
        direction: [name for name in COLUMNS if select(timed, direction=direction, implementation=name)]
        for direction in dict.fromkeys(row["direction"] for row in timed)
    }
    peaks = [row["matmul_tflops"] for row in rows if "matmul_tflops" in row]
    peak = f"; a large matrix product reaches {statistics.median(peaks):.0f}" if peaks else ""
    has_other = any("problem" in row for row in timed)
    is_decode = any("gb_per_s" in row for row in timed)
    heads = [
        title
        for direction, names in columns.items()
        for title in (f"{direction}: ours", *(_title(timed, name) for name in names), "ours / best")
    ]
    lines = [
        f"**{about['device']}, {about['dtype']}**: TFLOP/s on visible scores{peak}. *ours / best* compares with the "
        "fastest other implementation, within rounds of one run: above 1 ours is faster. "
        + "GB/s where one query meets many keys. " * is_decode
        + "* computes less than the case: right only in rows that are no padding. " * has_other
        + f"{_lead(rows)} Driver {_all(rows, 'driver')}, CUDA {_all(rows, 'cuda')}, torch {_all(rows, 'torch')}; "
        f"commit {_all(rows, 'commit')}, {_dates(rows)}.",
        "",
        f"| D | mask | L | {' | '.join(heads)} |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for group in summary.groups(timed, ("mask",), by_head_dim=True):
        for length in sorted({row["shape"][2] for row in group}):
            case = [row for row in group if row["shape"][2] == length]
            cells = [
                cell
                for direction, names in columns.items()
                for cell in _gpu_cells(select(case, direction=direction), names)
            ]
            head_dim, mask = case[0]["shape"][3], plots.TITLES[case[0]["mask"]]
            lines.append(f"| {head_dim} | {mask} | {length} | {' | '.join(cells)} |")
    return lines


def _title(rows: list[Row], name: str) -> str:
    """With the version of its package, where that is not torch."""
    row = select(rows, implementation=name)[0]
    version = row.get("version")
    return name if version is None or name.startswith("torch") else f"{name} ({row['package']} {version})"


def _gpu_cells(rows: list[Row], names: list[str]) -> list[str]:
    """Of one case and direction: ours, those of these names, and the ratio to the fastest other one."""
    found = [_rate(select(rows, implementation=name)) for name in (OURS, *names)]
    others = summary.fastest_others(rows) if _ours(rows) else []
    ratios = [f"{row['over_ours']:.2f} {row['implementation']}{'*' * ('problem' in row)}" for row in others]
    return [*found, ", ".join(ratios) or "-"]


def _rate(rows: list[Row]) -> str:
    if not rows:
        return "-"
    rate = rows[0]["gb_per_s"] if "gb_per_s" in rows[0] else rows[0]["effective_tflops"]
    return f"{rate:.0f}{'*' * ('problem' in rows[0])}"


def _ours(rows: list[Row]) -> list[Row]:
    return [row for row in select(rows, implementation=OURS) if "median_ms" in row]


def _cases(rows: list[Row]) -> list[list[Row]]:
    return summary.groups([row | {"size": tuple(row["shape"])} for row in rows], ("mask", "size", "direction"))


def _lead(rows: list[Row]) -> str:
    """In how many cases ours is the fastest, and by how much it leads or trails."""
    parts = []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        ratios = []
        for case in _cases(select(rows, direction=direction)):
            others = [row["over_ours"] for row in summary.fastest_others(case) if "problem" not in row]
            ratios += others if _ours(case) else []
        if ratios:
            span = f"{min(ratios):.2f} to {max(ratios):.2f}"
            parts.append(f"{sum(ratio > 1.0 for ratio in ratios)} of {len(ratios)} cases {direction} ({span})")
    return f"Ours is the fastest in {' and '.join(parts)}." if parts else ""


def _all(rows: list[Row], field: str) -> str:
    """What rows of several runs say, each once."""
    return ", ".join(dict.fromkeys(str(row[field]) for row in rows))


def _dates(rows: list[Row]) -> str:
    days = sorted({row["date"][:10] for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def cpu_tables(rows: list[Row]) -> str:
    about = rows[0]
    shapes = sorted({tuple(row["shape"]) for row in rows if row["benchmark"] == "cpu"}, key=lambda s: (s[2], s[3]))
    commits = sorted({row["commit"] for row in rows if row["benchmark"] == "cpu"})
    lines = [
        f"Time of `F.scaled_dot_product_attention` divided by ours, on {about['cores']} cores of {about['device']} "
        f"({about['isa']}, {about['threads']} threads), torch {about['torch']}; commit {', '.join(commits)}, "
        f"{_dates(rows)}. Geometric mean [least, greatest] over (B, H, L, D) = {', '.join(map(str, shapes))}; "
        "above 1, ours is faster. torch is given `is_causal`, a (B, 1, 1, S) mask for padding, and for both a "
        "(B, 1, L, S) one, which are made beforehand.",
        "",
        "| | " + " | ".join(MASKS.values()) + " |",
        "|---" * (len(MASKS) + 1) + "|",
    ]
    held = " and masks made for it" if any("held_mib" in row for row in rows) else ""
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "forward+backward"):
            cells = [_ratio_cell(rows, dtype, direction, mask) for mask in MASKS]
            lines.append(f"| {dtype} {direction} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Peak extra memory of one call at (1, 4, 8192, 64), results{held} included, ours / torch's, in MiB:",
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
    more = [line for table in (_short, _decode, _features, _modules, _isa, _step) for line in table(rows)]
    if more:
        lines += ["", "Beside that, torch's time divided by ours unless a line says otherwise:", "", *more]
    return "\n".join(lines)


def _short(rows: list[Row]) -> list[str]:
    rows = [row for row in select(rows, benchmark="cpu-short") if "ratio" in row]
    if not rows:
        return []
    batch, heads, _, head_dim = rows[0]["shape"]
    lengths = sorted({row["shape"][2] for row in rows})
    parts = [
        f"{direction} {_mean_and_range([row['ratio'] for row in select(rows, direction=direction)])}"
        for direction in dict.fromkeys(row["direction"] for row in rows)
    ]
    return [f"- ({batch}, {heads}, L, {head_dim}) with L of {', '.join(map(str, lengths))}: {'; '.join(parts)}"]


def _decode(rows: list[Row]) -> list[str]:
    return [
        f"- one query of {row['shape'][1]} heads against {row['shape'][2]} keys, {row['dtype']}: {row['ratio']:.2f}, "
        f"{row['gb_per_s']:.0f} GB/s where a sum reads {row['read_gb_per_s']:.0f} from main memory"
        for row in select(rows, benchmark="cpu-decode", implementation="fused_attn")
    ]


def _features(rows: list[Row]) -> list[str]:
    rows = select(rows, benchmark="cpu-features", implementation="fused_attn")
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = select(rows, dtype=dtype)
        cells = ", ".join(f"{row['mask']} {row['ratio']:.1f}" for row in own)
        lines.append(f"- where torch leaves its fused kernel, forward at {tuple(own[0]['shape'])}, {dtype}: {cells}")
    return lines


def _modules(rows: list[Row]) -> list[str]:
    rows = select(rows, benchmark="cpu-module", implementation="fused_attn")
    lines = []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        cells = ", ".join(
            f"({row['batch']}, {row['length']}, {row['d_model']}) {row['ratio']:.2f}"
            for row in select(rows, direction=direction)
        )
        lines.append(f"- `FusedMultiheadAttention` against `nn.MultiheadAttention` at (N, L, E), {direction}: {cells}")
    return lines


def _isa(rows: list[Row]) -> list[str]:
    rows = select(rows, benchmark="cpu-isa")
    parts = []
    for isa in dict.fromkeys(row["implementation"] for row in rows):
        own = select(rows, implementation=isa)
        if own[0]["best_isa"] != isa:
            parts.append(f"{isa} {_mean_and_range([row['speed'] for row in own])}")
    return [f"- speed of our other instruction sets on that machine, float32: {', '.join(parts)}"] if parts else []


def _step(rows: list[Row]) -> list[str]:
    return [
        f"- a training step of `examples/train_g2p.py` with torch's attention in the same model: {row['ratio']:.2f}"
        for row in select(rows, benchmark="cpu-step", implementation="fused_attn")
    ]


def _ratio_cell(rows: list[Row], dtype: str, direction: str, mask: str) -> str:
    chosen = select(rows, benchmark="cpu", dtype=dtype, direction=direction, mask=mask, implementation="fused_attn")
    return _mean_and_range([row["ratio"] for row in chosen])


def _mean_and_range(ratios: list[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def _memory_cell(rows: list[Row], dtype: str, direction: str, mask: str) -> str:
    case = {"benchmark": "cpu", "shape": [1, 4, 8192, 64], "dtype": dtype, "direction": direction, "mask": mask}
    ours, theirs = (
        summary.mib_of(select(rows, **case, implementation=implementation)[0])
        for implementation in ("fused_attn", "torch")
    )
    return f"{ours:.0f} / {theirs:.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
