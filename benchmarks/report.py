"""Writes RESULTS.md, its plots and the README's table from the committed rows: ``python -m benchmarks report``."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks import cases, plots, summary
from benchmarks.conventions import OURS, ROOT
from benchmarks.rows import MACHINE, Row, by_machine, machine_of, newest, read, select

README = ROOT / "README.md"
PAGE = ROOT / "benchmarks" / "RESULTS.md"
ROWS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "benchmarks" / "plots"
#: The lines of README.md around the generated table.
BEGIN, END = "<!-- benchmarks:summary -->", "<!-- /benchmarks:summary -->"

#: The columns of the README's table, with their masks. On a CPU half of each sequence is padding, on a GPU the lengths
#: are random.
SUMMARY = {
    "no mask": ("none",),
    "causal": ("causal",),
    "padding": ("padded", "padded-random"),
    "causal + padding": ("causal+padded", "causal+padded-random"),
    "bias with gradient": ("bias",),
}
#: The benchmarks with tables or plots of their own.
SHOWN_ELSEWHERE = ("attention", "masks", "memory")
#: The rivals with a column of their own in the tables of GPUs.
COLUMNS = ("flash_attn4", "flash_attn3", "torch-cudnn", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-plots", action="store_true", help="write tables only, without matplotlib")


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
    """The committed rows, without those that a later run has measured again.

    Batches of few sequences with random lengths are left out, because the lengths decide the time. Of the attention
    benchmark on a GPU, only the rows of the newest commit count: one table must not mix the kernels of two commits.
    """
    committed = newest(row for path in sorted(folder.glob("*.jsonl")) for row in read(path))
    rows = [row for row in committed if not _has_few_draws(row)]
    commits = {row["device"]: row["commit"] for row in sorted(rows, key=lambda row: row["date"]) if is_of_a_gpu(row)}
    return [row for row in rows if not is_of_a_gpu(row) or row["commit"] == commits[row["device"]]]


def _has_few_draws(row: Row) -> bool:
    return row.get("mask") in cases.RANDOM_MASKS and row["shape"][0] < cases.LEAST_SEQUENCES


def is_of_a_gpu(row: Row) -> bool:
    """Whether the attention benchmark has measured the row on a GPU."""
    return row["benchmark"] == "attention" and "driver" in row


def with_summary(readme: str, rows: list[Row]) -> str:
    """The text of the README with the table of these rows in place of its old table."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{summary_table(rows)}\n{END}{rest.split(END)[1]}"


def page(rows: list[Row]) -> str:
    """The text of RESULTS.md."""
    links = (f"![{plot.title}]({PLOTS.name}/{name}.png)" for name, plot in plots.plots_of(rows).items())
    sections = {
        "CPU": cpu_tables(rows), "GPU": gpu_page(rows), "Memory": memory_table(rows), "Plots": "\n\n".join(links),
    }  # fmt: skip
    method = "Generated from the rows in `results/` by `python -m benchmarks report`; the method is in"
    lines = ["# Results", "", method, "[README.md](README.md)."]
    for title, text in sections.items():
        lines += ["", f"## {title}", "", text] if text else []
    return "\n".join(lines) + "\n"


def _table(header: list[str], lines: Iterable[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    return [head, "|---" * len(header) + "|", *body]


def _mean_and_range(ratios: list[float]) -> str:
    """ "1.50 [1.20, 1.90]": the geometric mean, the least and the greatest."""
    return f"{statistics.geometric_mean(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else "-"


def _about(rows: list[Row], *fields: str) -> str:
    """ "torch 2.13, CUDA 13.0; commit abc1234, 2026-11-01 to 2026-11-02": every value that the rows have."""

    def values(field: str) -> str:
        return ", ".join(dict.fromkeys(str(row[field]) for row in rows))

    versions = ", ".join(f"{field.replace('cuda', 'CUDA')} {values(field)}" for field in fields)
    days = sorted({row["date"][:10] for row in rows})
    return f"{versions}; commit {values('commit')}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"


# ---- The README's table


def summary_table(rows: list[Row]) -> str:
    """A line for each machine, dtype and direction, with the ratio of the fastest other implementation to ours."""
    measured = [row for row in rows if is_of_a_gpu(row)] + select(rows, benchmark="masks")
    lines = []
    for group in summary.groups(measured, (*MACHINE, "dtype", "direction")):
        cells = [_mean_and_range(_leads([row for row in group if row["mask"] in masks])) for masks in SUMMARY.values()]
        lines.append([machine_of(group[0]), f"{group[0]['dtype']} {group[0]['direction']}", *cells])
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


def _leads(rows: list[Row]) -> list[float]:
    """For each case that ours is timed on, the time of the fastest other implementation / ours."""
    rows = [row | {"size": tuple(row["shape"])} for row in rows]
    timed = [case for case in summary.groups(rows, ("mask", "size", "direction")) if _is_timed(case)]
    others = [row for case in timed for row in summary.fastest_others(case)]
    return [row["over_ours"] for row in others if "problem" not in row]


def _is_timed(rows: list[Row]) -> bool:
    """Whether ours has a time in one of these rows."""
    return any("median_ms" in row for row in select(rows, implementation=OURS))


# ---- GPU


def gpu_page(rows: list[Row]) -> str:
    """The tables of all GPUs, and below them, for each GPU, lines about its other rows."""
    return "\n\n".join(filter(None, [gpu_tables(rows), *lists([row for row in rows if "driver" in row])]))


def gpu_tables(rows: list[Row]) -> str:
    """A table for each GPU and dtype. The text is empty without rows of a GPU."""
    groups = summary.groups(filter(is_of_a_gpu, rows), ("device", "dtype"))
    return "\n\n".join("\n".join(_gpu_table(group)) for group in groups if _is_timed(group))


def _gpu_table(rows: list[Row]) -> list[str]:
    """A line for each head dim, mask and length, and columns for each direction."""
    about = rows[0]
    timed = [row for row in rows if "median_ms" in row]
    columns = {
        direction: [name for name in COLUMNS if select(timed, direction=direction, implementation=name)]
        for direction in dict.fromkeys(row["direction"] for row in timed)
    }
    peaks = [row["matmul_tflops"] for row in rows if "matmul_tflops" in row]
    peak = f"; a large matrix product reaches {statistics.median(peaks):.0f}" if peaks else ""
    heads = [
        title
        for direction, names in columns.items()
        for title in (f"{direction}: ours", *(_title(timed, name) for name in names), "ours / best")
    ]
    lines = []
    for group in summary.groups(timed, ("mask",), by_head_dim=True):
        for length in sorted({row["shape"][2] for row in group}):
            case = [row for row in group if row["shape"][2] == length]
            cells = [str(case[0]["shape"][3]), cases.MASKS[case[0]["mask"]], str(length)]
            for direction, names in columns.items():
                cells += _gpu_cells(select(case, direction=direction), names)
            lines.append(cells)
    return [
        f"**{about['device']}, {about['dtype']}**: TFLOP/s on visible scores{peak}. *ours / best* compares with the "
        "fastest other implementation, within rounds of one run: above 1 ours is faster. "
        + "GB/s where one query meets many keys. " * any("gb_per_s" in row for row in timed)
        + "* computes less than the case: right only in rows that are no padding. "
        * any("problem" in row for row in timed)
        + f"{_lead(rows)} Driver {_about(rows, 'driver', 'cuda', 'torch').removeprefix('driver ')}.",
        "",
        *_table(["D", "mask", "L", *heads], lines),
    ]


def _title(rows: list[Row], name: str) -> str:
    """ "flash_attn3 (fa3-fwd 0.0.3)": an implementation, with package and version unless torch brings it."""
    row = select(rows, implementation=name)[0]
    version = row.get("version")
    return name if version is None or name.startswith("torch") else f"{name} ({row['package']} {version})"


def _gpu_cells(rows: list[Row], names: list[str]) -> list[str]:
    """The cells of one case: the rate of ours, the rates of these rivals, and the ratio to the fastest rival."""
    cells = []
    for name in (OURS, *names):
        own = select(rows, implementation=name)[:1]
        cells.append("".join(map(_rate, own)) or "-")
    others = summary.fastest_others(rows) if _is_timed(rows) else []
    ratios = [f"{row['over_ours']:.2f} {row['implementation']}{_star(row)}" for row in others]
    return [*cells, ", ".join(ratios) or "-"]


def _rate(row: Row) -> str:
    """The rate of a row. What computes less than the case has none: it does not compute the operations of the case."""
    return "*" if "problem" in row else f"{row.get('gb_per_s') or row['effective_tflops']:.0f}"


def _star(row: Row) -> str:
    return "*" * ("problem" in row)


def _lead(rows: list[Row]) -> str:
    """A sentence: in how many cases ours is the fastest, and the range of the ratios."""
    parts = []
    for group in summary.groups(rows, ("direction",)):
        if ratios := _leads(group):
            span = f"{min(ratios):.2f} to {max(ratios):.2f}"
            won = sum(ratio > 1.0 for ratio in ratios)
            parts.append(f"{won} of {len(ratios)} cases {group[0]['direction']} ({span})")
    return f"Ours is the fastest in {' and '.join(parts)}." if parts else ""


# ---- CPU


def cpu_tables(rows: list[Row]) -> str:
    """For each CPU, the table of masks if it has been measured, and a list with a line about each other table."""
    tables = []
    for own in by_machine(row for row in rows if "driver" not in row).values():
        masks = [row for row in select(own, benchmark="masks") if "median_ms" in row]
        tables += ["\n".join(_masks_table(masks))] if masks else []
        tables += lists(own)
    return "\n\n".join(tables)


def lists(rows: list[Row]) -> list[str]:
    """For each machine and commit, a list with a line about each table that is not one of masks or of memory."""
    found = []
    timed = (row for row in rows if row["benchmark"] not in SHOWN_ELSEWHERE and "median_ms" in row)
    for own in by_machine(timed).values():
        for group in summary.groups(own, ("torch", "commit")):
            if lines := [line for make in LINES for line in make(group)]:
                where = f"On {machine_of(group[0])}, {_about(group, 'torch')}"
                head = f"{where}, torch's time divided by ours unless a line says otherwise:"
                found.append("\n".join([head, "", *lines]))
    return found


def _masks_table(rows: list[Row]) -> list[str]:
    about, masks = rows[0], cases.FIXED["masks"].masks
    shapes = sorted({tuple(row["shape"]) for row in rows}, key=lambda shape: (shape[2], shape[3]))
    lines = [
        [f"{own[0]['dtype']} {own[0]['direction']}", *(_mean_and_range(_ratios(own, mask=mask)) for mask in masks)]
        for own in summary.groups(rows, ("dtype", "direction"))
    ]
    return [
        f"Time of `F.scaled_dot_product_attention` divided by ours, on {machine_of(about)}, "
        f"{_about(rows, 'torch')}. Geometric mean [least, greatest] over "
        f"(B, H, L, D) = {', '.join(map(str, shapes))}; above 1, ours is faster. torch is given `is_causal`, a "
        "(B, 1, 1, S) mask for padding, and for both a (B, 1, L, S) one, which are made beforehand.",
        "",
        *_table(["", *map(cases.MASKS.get, masks)], lines),
    ]


def _of_torch(rows: list[Row], **wanted: object) -> list[Row]:
    """The rows of torch with a ratio to ours, whose fields have these values."""
    return [row for row in select(rows, implementation="torch", **wanted) if "over_ours" in row]


def _ratios(rows: list[Row], **wanted: object) -> list[float]:
    """Torch's time / ours, in the rows whose fields have these values."""
    return [row["over_ours"] for row in _of_torch(rows, **wanted)]


def _short(rows: list[Row]) -> list[str]:
    rows = _of_torch(rows, benchmark="short")
    if not rows:
        return []
    batch, heads, _, head_dim = rows[0]["shape"]
    lengths = ", ".join(map(str, sorted({row["shape"][2] for row in rows})))
    groups = summary.groups(rows, ("direction",))
    parts = [f"{own[0]['direction']} {_mean_and_range(_ratios(own))}" for own in groups]
    return [f"- ({batch}, {heads}, L, {head_dim}) with L of {lengths}: {'; '.join(parts)}"]


def _decode(rows: list[Row]) -> list[str]:
    lines = []
    for ours in select(rows, benchmark="decode", implementation=OURS):
        same = {name: ours[name] for name in ("benchmark", "shape", "dtype")}
        ratio = "".join(f"{x:.2f}, " for x in _ratios(rows, **same))
        reads = "read_gb_per_s" in ours
        memory = f"a {'sum reads' if reads else 'copy moves'} {ours['read_gb_per_s' if reads else 'copy_gb_per_s']:.0f}"
        lines.append(
            f"- one query of {ours['shape'][1]} heads against {ours['shape'][2]} keys, {ours['dtype']}: "
            f"{ratio}{ours['gb_per_s']:.0f} GB/s where {memory} from main memory"
        )
    return lines


def _caches(rows: list[Row]) -> list[str]:
    """For each dtype and head group of the table "cache": rates and ratios, from the shortest to the longest cache."""
    rows = [row | {"heads": row["shape"][1]} for row in select(rows, benchmark="generation", table="cache")]
    lines = []
    for group in summary.groups(rows, ("heads", "kv_heads", "dtype")):
        ours = sorted(select(group, implementation=OURS), key=lambda row: row["shape"][2])
        if not ours:
            continue
        names = dict.fromkeys(row["implementation"] for row in group if "over_ours" in row)
        lengths = ", ".join(str(row["shape"][2]) for row in ours)
        rates = ", ".join(f"{row['gb_per_s']:.1f}" for row in ours)
        fractions = ", ".join(f"{row['machine_fraction']:.2f}" for row in ours)
        of_what = "a sum over them reads" if "read_gb_per_s" in ours[0] else "a large copy moves"
        parts = [f"ours {rates} GB/s, which is {fractions} of what {of_what}; time / ours: "]
        for name in names:
            own = {row["shape"][2]: row for row in select(group, implementation=name)}
            ratios = (own.get(row["shape"][2], {}).get("over_ours") for row in ours)
            parts.append(f"{name} " + ", ".join("-" if x is None else f"{x:.2f}" for x in ratios))
        lines.append(
            f"- one query of {ours[0]['shape'][1]} heads over a cache with {ours[0]['kv_heads']} heads of keys, "
            f"{ours[0]['dtype']}, with {lengths} keys: {parts[0]}{'; '.join(parts[1:])}"
        )
    return lines


def _others(rows: list[Row], ours: Row, *same: str) -> str:
    """The other implementations with their time / ours, in rows that equal our row in these fields."""
    others = [row for row in select(rows, **{name: ours[name] for name in same}) if "over_ours" in row]
    ratios = ", ".join(f"{row['implementation']} {row['over_ours']:.2f}" for row in others)
    return f"; time / ours: {ratios}" if ratios else ""


def _serving(rows: list[Row]) -> list[str]:
    lines = []
    for ours in select(rows, benchmark="generation", table="serving", implementation=OURS):
        lines.append(
            f"- a step of a server, {ours['mix']}: {ours['queries']} queries of {ours['sequences']} sequences, "
            f"{ours['keys']} keys in pages of {ours['page_size']}, {ours['heads']} heads, {ours['kv_heads']} of keys, "
            f"{ours['dtype']}: ours {ours['median_ms']:.2f} ms"
            + _others(rows, ours, "benchmark", "table", "dtype", "mix")
        )
    return lines


def _generation(rows: list[Row]) -> list[str]:
    lines = []
    for ours in select(rows, benchmark="generation", table="generation", implementation=OURS):
        lines.append(
            f"- greedy generation of {ours['new_tokens']} tokens for {ours['batch']} sources of {ours['length']} "
            f"tokens, {ours['layers']} + {ours['layers']} layers of {ours['d_model']} features, {ours['dtype']}: ours "
            f"{ours['tokens_per_s']:.0f} tokens/s" + _others(rows, ours, "benchmark", "table", "dtype", "new_tokens")
        )
    return lines


def _steps(rows: list[Row]) -> list[str]:
    lines = []
    for ours in select(rows, benchmark="generation", table="step", implementation=OURS):
        lines.append(
            f"- a step of greedy generation for {ours['batch']} sources with {ours['length']} tokens in the cache, "
            f"{ours['layers']} layers of {ours['d_model']} features, {ours['dtype']}: ours {ours['median_ms']:.2f} ms"
            + _others(rows, ours, "benchmark", "table", "dtype", "length")
        )
    return lines


def _modules(rows: list[Row]) -> list[str]:
    lines = []
    for ours in select(rows, benchmark="modules", implementation=OURS):
        lines.append(
            f"- a training step of the module `{ours['module']}` at (N, L, E) = "
            f"({ours['batch']}, {ours['length']}, {ours['d_model']}), {ours['dtype']}: "
            f"ours {ours['tokens_per_s']:.0f} tokens/s" + _others(rows, ours, "benchmark", "module", "dtype")
        )
    return lines


def _distributed(rows: list[Row]) -> list[str]:
    """What processes need, beside what the planner predicts. The 20th percentile is what it is compared with."""
    lines = []
    for own in summary.groups(select(rows, benchmark="distributed"), ("table", "processes", "shape", "dtype")):
        times = (f"{row['direction']} {row['p20_ms']:.0f} (predicted {row['predicted_ms']:.0f})" for row in own)
        lines.append(
            f"- causal attention of {own[0]['processes']} processes at {tuple(own[0]['shape'])}, {own[0]['dtype']}, by "
            f"{own[0]['table']}, in milliseconds: {', '.join(times)}"
        )
    return lines


def _features(rows: list[Row]) -> list[str]:
    return [
        f"- where torch leaves its fused kernel, forward at {tuple(own[0]['shape'])}, {own[0]['dtype']}: "
        + ", ".join(f"{row['mask']} {row['over_ours']:.1f}" for row in own)
        for own in summary.groups(_of_torch(rows, benchmark="features"), ("dtype",))
    ]


def _small_modules(rows: list[Row]) -> list[str]:
    return [
        f"- `FusedMultiheadAttention` against `nn.MultiheadAttention` at (N, L, E), {own[0]['direction']}: "
        + ", ".join(f"({row['batch']}, {row['length']}, {row['d_model']}) {row['over_ours']:.2f}" for row in own)
        for own in summary.groups(_of_torch(rows, benchmark="small-modules"), ("direction",))
    ]


def _layers(rows: list[Row]) -> list[str]:
    lines = []
    for own in summary.groups(_of_torch(rows, benchmark="layers"), ("direction", "dtype")):
        step = "a training step with dropout" if own[0]["direction"] == "training" else "inference"
        sizes = (f"({row['batch']}, {row['length']}, {row['d_model']}) {row['over_ours']:.2f}" for row in own)
        text = "`TransformerEncoderLayer` against torch's at (N, L, E)"
        lines.append(f"- {text}, {step}, {own[0]['dtype']}: {', '.join(sizes)}")
    return lines


def _isa(rows: list[Row]) -> list[str]:
    """The speed of each instruction set but the best one of the machine, whose speed counts as 1."""
    rows = [row for row in select(rows, benchmark="isa") if row["implementation"] != row["best_isa"]]
    groups = summary.groups(rows, ("implementation",))
    parts = [f"{group[0]['implementation']} {_mean_and_range([row['speed'] for row in group])}" for group in groups]
    return [f"- speed of our other instruction sets on that machine, float32: {', '.join(parts)}"] if parts else []


def _step(rows: list[Row]) -> list[str]:
    text = "- a training step of `examples/train_g2p.py` with torch's attention in the same model:"
    return [f"{text} {ratio:.2f}" for ratio in _ratios(rows, benchmark="step")]


def _overhead(rows: list[Row]) -> list[str]:
    parts = []
    for own in summary.groups(select(rows, benchmark="overhead"), ("direction",)):
        best = {row["implementation"]: f"{row['best_ms'] * 1e3:.1f}" for row in own}
        parts.append(f"{own[0]['direction']} {best.get(OURS, '-')} / {best.get('torch', '-')}")
    text = "- a call at (1, 2, 4, 8), ours / torch's, best of many, in microseconds:"
    return [f"{text} {', '.join(parts)}"] if parts else []


#: What makes the lines of `lists`.
LINES = (
    _short, _decode, _caches, _serving, _generation, _steps, _features, _small_modules, _layers, _modules, _isa, _step,
    _overhead, _distributed,
)  # fmt: skip


# ---- Memory


def memory_table(rows: list[Row]) -> str:
    """A table for each machine: the memory at the longest length, and how memory grows with the length."""
    machines = by_machine(plots.sweep_of_memory(rows)).values()
    return "\n\n".join("\n".join(_memory(own)) for own in machines)


def _memory(rows: list[Row]) -> list[str]:
    about = rows[0]
    batch, heads, _, head_dim = about["shape"]
    longest = max(row["shape"][2] for row in rows)
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = [
        [f"{own[0]['dtype']} {own[0]['direction']}", cases.MASKS[own[0]["mask"]]]
        + [_growth(select(own, implementation=name), longest) for name in names]
        for table in summary.groups(rows, ("dtype", "direction"))
        for own in summary.groups(table, ("mask",))
    ]
    return [
        f"MiB beyond inputs and results of one call at (B, H, L, D) = ({batch}, {heads}, {longest}, {head_dim}) on "
        f"{machine_of(about)}, and how they grow where several L were measured. A mask or dense bias that an "
        f"implementation must be given counts. {_about(rows, 'torch')}.",
        "",
        *_table(["", "", *names], lines),
    ]


def _growth(rows: list[Row], longest: int) -> str:
    """ "64, L^1.0": the MiB at the longest length, and the exponent of growth, both of the newest commit."""
    commits = summary.groups(sorted(rows, key=lambda row: row["date"]), ("commit",))
    newest_rows = commits[-1] if commits else []
    at_longest = [row for row in newest_rows if row["shape"][2] == longest]
    exponent = summary.growth_exponent(newest_rows)
    mib = f"{summary.mib_of(at_longest[0]):.0f}" if at_longest else "-"
    return mib if exponent is None else f"{mib}, L^{round(exponent, 1) + 0.0:.1f}"
