"""Writes RESULTS.md, its plots and the README's summary from the committed rows: ``python -m benchmarks report``."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import plots, summary
from benchmarks.conventions import OURS, ROOT
from benchmarks.rows import Row, newest, read, select

README = ROOT / "README.md"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
ROWS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "benchmarks" / "plots"
BEGIN, END = "<!-- benchmarks:summary -->", "<!-- /benchmarks:summary -->"

MASKS = {
    "none": "no mask",
    "causal": "causal",
    "padded": "half padded",
    "causal+padded": "causal + padded",
    "bias": "bias with gradient",
}
#: The columns of the summary. A CPU is measured with half of each sequence padding, a GPU with random lengths.
SUMMARY = {
    "no mask": ("none",),
    "causal": ("causal",),
    "padding": ("padded", "padded-random"),
    "causal + padding": ("causal+padded", "causal+padded-random"),
    "bias with gradient": ("bias",),
}
#: The other implementations that have a column of their own in the tables of GPUs, if there are rows of them.
COLUMNS = ("flash_attn4", "flash_attn3", "torch-cudnn", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")


def main(arguments: argparse.Namespace) -> int:
    rows = all_rows()
    README.write_text(with_summary(README.read_text(), rows))
    PAGE.write_text(page(rows))
    if not arguments.no_plots:
        try:
            written = plots.draw_all(rows, PLOTS)
        except ImportError as error:
            print(f"no plots: {error} (pip install -e '.[benchmarks]')", file=sys.stderr)
            return 1
        print(*(path.relative_to(ROOT) for path in written), sep="\n")
    return 0


def all_rows(folder: Path = ROWS) -> list[Row]:
    """The newest of what several runs have measured; of a GPU, only those of its newest commit."""
    rows = newest(row for path in sorted(folder.glob("*.jsonl")) for row in read(path))
    commits = {row["device"]: row["commit"] for row in sorted(rows, key=lambda row: row["date"]) if is_of_a_gpu(row)}
    return [row for row in rows if not is_of_a_gpu(row) or row["commit"] == commits[row["device"]]]


def is_of_a_gpu(row: Row) -> bool:
    return row["benchmark"] == "attention" and "driver" in row


def with_summary(readme: str, rows: list[Row]) -> str:
    """The README with the summary of these rows in place of the one it has."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{summary_table(rows)}\n{END}{tail}"


def page(rows: list[Row]) -> str:
    sections = {"CPU": cpu_tables(rows), "GPU": gpu_tables(rows), "Memory": memory_table(rows), "Plots": links(rows)}
    lines = [
        "# Results",
        "",
        "Generated from the rows in `results/` by `python -m benchmarks report`; the method is in",
    ]
    lines += ["[README.md](README.md)."]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", text] if text else []
    return "\n".join(lines) + "\n"


def links(rows: list[Row]) -> str:
    return "\n\n".join(f"![{plot.title}]({PLOTS.name}/{name}.png)" for name, plot in plots.plots_of(rows).items())


def _table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    head, *body = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    return [head, "|---" * len(header) + "|", *body]


def _mean_and_range(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    return f"{statistics.geometric_mean(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def _all(rows: list[Row], field: str) -> str:
    """What rows of several runs say, each once."""
    return ", ".join(dict.fromkeys(str(row[field]) for row in rows))


def _dates(rows: list[Row]) -> str:
    days = sorted({row["date"][:10] for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _about(rows: list[Row], *fields: str) -> str:
    versions = ", ".join(f"{field.replace('cuda', 'CUDA')} {_all(rows, field)}" for field in fields)
    return f"{versions}; commit {_all(rows, 'commit')}, {_dates(rows)}"


# ---- The summary


def summary_table(rows: list[Row]) -> str:
    """One table of all devices."""
    measured = [row for row in rows if row["benchmark"] == "masks" or is_of_a_gpu(row)]
    lines = []
    for group in summary.groups(measured, ("device", "dtype", "direction")):
        first = group[0]
        cells = []
        for masks in SUMMARY.values():
            cases = _cases([row for row in group if row["mask"] in masks])
            others = [row for case in cases for row in summary.fastest_others(case) if "problem" not in row]
            cells.append(_mean_and_range([row["over_ours"] for row in others]))
        lines.append([first["device"], f"{first['dtype']} {first['direction']}", *cells])
    return "\n".join(
        [
            "Time of the fastest other implementation divided by ours: above 1, ours is faster. Geometric mean "
            "[least, greatest] over sizes. On a CPU the other one is `F.scaled_dot_product_attention`, and half of "
            "each padded sequence is padding. On a GPU the others are those of torch and FlashAttention that compute "
            "the case, and padded sequences have random lengths.",
            "",
            *_table(["", "", *SUMMARY], lines),
        ]
    )


# ---- GPU


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
    lines = []
    for group in summary.groups(timed, ("mask",), by_head_dim=True):
        for length in sorted({row["shape"][2] for row in group}):
            case = [row for row in group if row["shape"][2] == length]
            cells = [
                cell
                for direction, names in columns.items()
                for cell in _gpu_cells(select(case, direction=direction), names)
            ]
            lines.append([str(case[0]["shape"][3]), plots.TITLES[case[0]["mask"]], str(length), *cells])
    return [
        f"**{about['device']}, {about['dtype']}**: TFLOP/s on visible scores{peak}. *ours / best* compares with the "
        "fastest other implementation, within rounds of one run: above 1 ours is faster. "
        + "GB/s where one query meets many keys. " * is_decode
        + "* computes less than the case: right only in rows that are no padding. " * has_other
        + f"{_lead(rows)} Driver {_about(rows, 'driver', 'cuda', 'torch').removeprefix('driver ')}.",
        "",
        *_table(["D", "mask", "L", *heads], lines),
    ]


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
        cases = [case for case in _cases(select(rows, direction=direction)) if _ours(case)]
        others = [row for case in cases for row in summary.fastest_others(case) if "problem" not in row]
        if ratios := [row["over_ours"] for row in others]:
            span = f"{min(ratios):.2f} to {max(ratios):.2f}"
            parts.append(f"{sum(ratio > 1.0 for ratio in ratios)} of {len(ratios)} cases {direction} ({span})")
    return f"Ours is the fastest in {' and '.join(parts)}." if parts else ""


# ---- CPU


def cpu_tables(rows: list[Row]) -> str:
    tables = []
    for group in summary.groups(select(rows, benchmark="masks"), ("device",)):
        own = select(rows, device=group[0]["device"])
        tables.append("\n".join(_masks_table(group) + _beside(own)))
    return "\n\n".join(tables)


def _masks_table(rows: list[Row]) -> list[str]:
    about = rows[0]
    shapes = sorted({tuple(row["shape"]) for row in rows}, key=lambda shape: (shape[2], shape[3]))
    lines = [
        [f"{dtype} {direction}", *(_mean_and_range(_ratios(own, mask=mask)) for mask in MASKS)]
        for own in summary.groups(rows, ("dtype", "direction"))
        for dtype, direction in [(own[0]["dtype"], own[0]["direction"])]
    ]
    return [
        f"Time of `F.scaled_dot_product_attention` divided by ours, on {about['cores']} cores of {about['device']} "
        f"({about['isa']}, {about['threads']} threads), {_about(rows, 'torch')}. Geometric mean [least, greatest] over "
        f"(B, H, L, D) = {', '.join(map(str, shapes))}; above 1, ours is faster. torch is given `is_causal`, a "
        "(B, 1, 1, S) mask for padding, and for both a (B, 1, L, S) one, which are made beforehand.",
        "",
        *_table(["", *MASKS.values()], lines),
    ]


def _ratios(rows: list[Row], **wanted: object) -> list[float]:
    return [row["over_ours"] for row in select(rows, implementation="torch", **wanted) if "over_ours" in row]


def _beside(rows: list[Row]) -> list[str]:
    """What is measured beside the table of masks."""
    found = [
        line for make in (_short, _decode, _features, _small_modules, _isa, _step, _overhead) for line in make(rows)
    ]
    return ["", "Beside that, torch's time divided by ours unless a line says otherwise:", "", *found] if found else []


def _by_direction(rows: list[Row]) -> dict[str, list[Row]]:
    return {group[0]["direction"]: group for group in summary.groups(rows, ("direction",))}


def _short(rows: list[Row]) -> list[str]:
    rows = select(rows, benchmark="short")
    if not rows:
        return []
    batch, heads, _, head_dim = rows[0]["shape"]
    lengths = ", ".join(map(str, sorted({row["shape"][2] for row in rows})))
    parts = [f"{direction} {_mean_and_range(_ratios(own))}" for direction, own in _by_direction(rows).items()]
    return [f"- ({batch}, {heads}, L, {head_dim}) with L of {lengths}: {'; '.join(parts)}"]


def _decode(rows: list[Row]) -> list[str]:
    lines = []
    for ours in select(rows, benchmark="decode", implementation=OURS):
        case = {name: ours[name] for name in ("benchmark", "shape", "dtype")}
        way, rate = next((way, ours[f"{way}_gb_per_s"]) for way in ("read", "copy") if f"{way}_gb_per_s" in ours)
        memory = f"{'a sum reads' if way == 'read' else 'a copy moves'} {rate:.0f} from main memory"
        lines.append(
            f"- one query of {ours['shape'][1]} heads against {ours['shape'][2]} keys, {ours['dtype']}: "
            f"{_ratios(rows, **case)[0]:.2f}, {ours['gb_per_s']:.0f} GB/s where {memory}"
        )
    return lines


def _features(rows: list[Row]) -> list[str]:
    return [
        f"- where torch leaves its fused kernel, forward at {tuple(own[0]['shape'])}, {own[0]['dtype']}: "
        + ", ".join(f"{row['mask']} {row['over_ours']:.1f}" for row in own)
        for own in summary.groups(select(rows, benchmark="features", implementation="torch"), ("dtype",))
    ]


def _small_modules(rows: list[Row]) -> list[str]:
    return [
        f"- `FusedMultiheadAttention` against `nn.MultiheadAttention` at (N, L, E), {direction}: "
        + ", ".join(f"({row['batch']}, {row['length']}, {row['d_model']}) {row['over_ours']:.2f}" for row in own)
        for direction, own in _by_direction(select(rows, benchmark="small-modules", implementation="torch")).items()
    ]


def _isa(rows: list[Row]) -> list[str]:
    """A line about the instruction sets besides the machine's best one, whose speed counts as 1."""
    rows = [row for row in select(rows, benchmark="isa") if row["implementation"] != row["best_isa"]]
    groups = summary.groups(rows, ("implementation",))
    parts = [f"{group[0]['implementation']} {_mean_and_range([row['speed'] for row in group])}" for group in groups]
    return [f"- speed of our other instruction sets on that machine, float32: {', '.join(parts)}"] if parts else []


def _step(rows: list[Row]) -> list[str]:
    text = "- a training step of `examples/train_g2p.py` with torch's attention in the same model:"
    return [f"{text} {ratio:.2f}" for ratio in _ratios(rows, benchmark="step")]


def _overhead(rows: list[Row]) -> list[str]:
    parts = []
    for direction, own in _by_direction(select(rows, benchmark="overhead")).items():
        ours, theirs = (select(own, implementation=name)[0]["best_ms"] * 1e3 for name in (OURS, "torch"))
        parts.append(f"{direction} {ours:.1f} / {theirs:.1f}")
    text = "- a call at (1, 2, 4, 8), ours / torch's, best of many, in microseconds:"
    return [f"{text} {', '.join(parts)}"] if parts else []


# ---- Memory


def memory_table(rows: list[Row]) -> str:
    """Of each device, the longest L that all of its rows share."""
    return "\n\n".join("\n".join(_memory(own)) for own in summary.groups(plots.sweep_of_memory(rows), ("device",)))


def _memory(rows: list[Row]) -> list[str]:
    about = rows[0]
    batch, heads, _, head_dim = about["shape"]
    longest = max(row["shape"][2] for row in rows)
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = [
        [f"{own[0]['dtype']} {own[0]['direction']}", plots.TITLES[own[0]["mask"]]]
        + [_growth(select(own, implementation=name), longest) for name in names]
        for table in summary.groups(rows, ("dtype", "direction"))
        for own in summary.groups(table, ("mask",))
    ]
    return [
        f"MiB beyond inputs and results of one call at (B, H, L, D) = ({batch}, {heads}, {longest}, {head_dim}) on "
        f"{about['device']}, and how they grow where several L were measured. A mask or dense bias that an "
        f"implementation must be given counts. {_about(rows, 'torch')}.",
        "",
        *_table(["", "", *names], lines),
    ]


def _growth(rows: list[Row], longest: int) -> str:
    """The exponent is that of one commit: of the one that has most lengths."""
    at_longest = [row for row in rows if row["shape"][2] == longest]
    if not at_longest:
        return "-"
    mib = summary.mib_of(max(at_longest, key=lambda row: row["date"]))
    sweep = max(summary.groups(rows, ("commit",)), key=len)
    exponent = summary.growth_exponent([row["shape"][2] for row in sweep], list(map(summary.mib_of, sweep)))
    return f"{max(0.0, mib):.0f}" + ("" if exponent is None else f", L^{abs(exponent):.1f}")
