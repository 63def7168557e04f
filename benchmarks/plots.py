"""Plots of rows: speed and memory against length, with a line for each implementation or mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import cases, summary
from benchmarks.conventions import OURS
from benchmarks.rows import Row, by_machine, machine_of, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The colour of each implementation, the same in every plot. Ours is red.
COLOURS = {
    "fused_attn": "#c1272d", "fused_attn[triton]": "#ff6f69", "fused_attn[cuda]": "#7a0c12", "torch": "#1f77b4",
    "fused_attn-skipping": "#e9967a", "torch-flash": "#17becf", "torch-efficient": "#2ca02c",
    "torch-cudnn": "#9467bd", "torch-math": "#7f7f7f",
    "torch-causal-only": "#87ceeb", "torch-varlen": "#8c564b", "flex": "#ff7f0e", "flash_attn2": "#bcbd22",
    "flash_attn3": "#556b2f", "flash_attn4": "#000080", "flash_attn3-packed": "#8fbc8f",
    "flash_attn4-packed": "#4169e1", "torch-cache": "#e377c2", "transformers-static": "#a0522d",
    "fused_attn-pages-64": "#f4a582", "fused_attn-pages-16": "#9a6324",
}  # fmt: skip
#: The head dim of the plot of speed-ups.
HEAD_DIM = 64
#: The width of one name in a legend.
INCHES_OF_A_NAME = 1.9
#: Less memory is drawn as this, because a logarithmic axis has no 0.
LEAST_MIB = 0.1


#: The panels of the plot of decoding: tables of `benchmarks.generation`, with their titles.
LATENCY = {"step": "a step of a whole model", "cache": "one query"}


class Plot(NamedTuple):
    """draw: makes the figure from the rows and the name of the machine"""

    title: str
    rows: list[Row]
    draw: Callable[[list[Row], str], Figure]


def draw_all(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Writes every plot of `plots_of` into a folder, and returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in plots_of(rows).items():
        path = folder / f"{name}.png"
        # Without the version of matplotlib in the file, the same rows give the same file.
        plot.draw(plot.rows, machine_of(plot.rows[0])).savefig(path, dpi=110, metadata={"Software": None})
        written.append(path)
    return written


def plots_of(rows: Iterable[Row]) -> dict[str, Plot]:
    """For each machine, the plots that can be made of its rows, by file name without ".png"."""
    plots = {}
    machines = by_machine(rows)
    slugs = list(map(_slug, machines))
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"device: expected names that differ in letters and digits, got {list(machines)}")
    for slug, (machine, own) in zip(slugs, machines.items(), strict=True):
        if found := select(own, benchmark="masks", implementation="torch"):
            title = f"Speed-up over F.scaled_dot_product_attention against length, {machine}"
            plots[f"speedup-{slug}"] = Plot(title, found, _speedup)
        # What computes less than the case has no rate: the operations of the case are not those that it computes.
        attention = [row for row in select(own, benchmark="attention") if "problem" not in row]
        for direction in dict.fromkeys(row["direction"] for row in attention):
            title = f"FLOP/s on visible scores against length, {direction}, {machine}"
            name = f"speed-{slug}-{direction.replace('+', '-')}"
            plots[name] = Plot(title, select(attention, direction=direction), _speed)
        timed = [row for row in select(own, benchmark="generation") if "median_ms" in row]
        if found := [row for row in timed if row["table"] in LATENCY]:
            title = f"Time of decoding against tokens in the cache, {machine}"
            plots[f"decoding-{slug}"] = Plot(title, found, _latency)
        if found := [row for row in sweep_of_memory(own) if "table" not in row]:
            title = f"Memory beyond inputs and results against length, {machine}"
            plots[f"memory-{slug}"] = Plot(title, found, _memory)
    return plots


def sweep_of_memory(rows: Iterable[Row]) -> list[Row]:
    """The rows of memory whose B, H and D are those of the first row, so that only the length differs."""
    rows = [row | {"size": (*row["shape"][:2], row["shape"][3])} for row in select(rows, benchmark="memory")]
    rows = [row for row in rows if "extra_mib" in row]
    return select(rows, size=rows[0]["size"]) if rows else []


def _speedup(rows: list[Row], machine: str) -> Figure:
    """Torch's time / ours against length: a panel for each dtype and direction, a line for each mask."""
    rows = [row for row in rows if "over_ours" in row and row["shape"][3] == HEAD_DIM]
    panels = summary.groups(rows, ("dtype", "direction"))
    figure, axes = _grid(len(panels), 2)
    for axis, chosen in zip(axes, panels, strict=False):
        for own in summary.groups(chosen, ("mask",)):
            points = sorted(own, key=_length)
            lengths = list(map(_length, points))
            label = cases.MASKS[own[0]["mask"]]
            line = axis.plot(lengths, [row["over_ours"] for row in points], marker="o", ms=4, label=label)[0]
            quartiles = [row["over_ours_q1"] for row in points], [row["over_ours_q3"] for row in points]
            axis.fill_between(lengths, *quartiles, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.axhline(1.0, color="black", linewidth=1, linestyle=":")
        axis.set_title(f"{chosen[0]['dtype']}, {chosen[0]['direction']}", fontsize=10)
        axis.set_yscale("log", base=2)
        _lengths_on_x(axis, chosen)
        axis.yaxis.set_major_formatter("{x:g}x")
    figure.supylabel("torch's time / ours; shaded: quartiles over rounds", fontsize=10)
    title = f"Speed-up over F.scaled_dot_product_attention, head dim {HEAD_DIM}\n{machine}"
    return _finish(figure, axes[: len(panels)], title)


def _memory(rows: list[Row], machine: str) -> Figure:
    """Memory against length, of forward and backward together if there are such rows."""
    directions = [row["direction"] for row in rows]
    direction = "forward+backward" if "forward+backward" in directions else directions[0]
    rows = select(rows, direction=direction, dtype=rows[0]["dtype"])
    batch, heads, _, head_dim = rows[0]["shape"]
    title = f"Memory of one call, {direction}, ({batch}, {heads}, L, {head_dim}), {rows[0]['dtype']}\n{machine}"
    label = "MiB beyond inputs and results; needed masks count"
    return _by_implementation(rows, lambda row: max(summary.mib_of(row), LEAST_MIB), label, title, is_log=True)


def _latency(rows: list[Row], machine: str) -> Figure:
    """Milliseconds against the number of tokens in the cache: a panel for each table, dtype, and head group."""
    rows = [row | {"group": row["shape"][1] // row["kv_heads"] if row["table"] == "cache" else 1} for row in rows]
    panels = summary.groups(rows, ("table", "dtype", "group"))
    figure, axes = _grid(len(panels), 2)
    for axis, chosen in zip(axes, panels, strict=False):
        for own in summary.groups(chosen, ("implementation",)):
            points, name = sorted(own, key=_cached), own[0]["implementation"]
            times = [row["median_ms"] for row in points]
            axis.plot(list(map(_cached, points)), times, marker="o", ms=4, label=name, color=COLOURS[name])
        shares = f", {chosen[0]['group']} heads a group" if chosen[0]["group"] > 1 else ""
        axis.set_title(f"{LATENCY[chosen[0]['table']]}, {chosen[0]['dtype']}{shares}", fontsize=10)
        axis.set_yscale("log")
        lengths = sorted(set(map(_cached, chosen)))
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xlabel("tokens in the cache", fontsize=8)
        axis.grid(alpha=0.3)
    figure.supylabel("milliseconds", fontsize=10)
    return _finish(figure, axes[: len(panels)], f"Decoding against the length of the cache\n{machine}")


def _cached(row: Row) -> int:
    """The number of tokens in the cache."""
    return row["length"] if row["table"] == "step" else row["shape"][2]


def _speed(rows: list[Row], machine: str) -> Figure:
    """FLOP/s on visible scores against length, of the dtype and the head dim that most rows have."""
    timed = [row for row in rows if "median_ms" in row]
    chosen = max(summary.groups(timed, ("dtype",), by_head_dim=True), key=len)
    first = chosen[0]
    title = f"Speed on visible scores, {first['direction']}, {first['dtype']}, head dim {first['shape'][3]}"
    tokens = {row["shape"][0] * row["shape"][2] for row in chosen}
    if len(tokens) == 1:
        title += f", {tokens.pop()} tokens a batch"
    is_slow = max(row["effective_tflops"] for row in chosen) < 1.0
    unit, scale = ("GFLOP/s", 1e3) if is_slow else ("TFLOP/s", 1.0)
    return _by_implementation(
        chosen, lambda row: scale * row["effective_tflops"], f"{unit} on visible scores", f"{title}\n{machine}"
    )


def _by_implementation(
    rows: list[Row], value_of: Callable[[Row], float], label: str, title: str, is_log: bool = False
) -> Figure:
    """A panel for each mask, with a line for each implementation."""
    panels = summary.groups(rows, ("mask",))
    figure, axes = _grid(len(panels), 3)
    for axis, chosen in zip(axes, panels, strict=False):
        for own in summary.groups(chosen, ("implementation",)):
            points, name = sorted(own, key=_length), own[0]["implementation"]
            axis.plot(
                list(map(_length, points)), list(map(value_of, points)), marker="o", ms=4, label=name,
                color=COLOURS[name], linewidth=2.5 if name == OURS else 1.5, zorder=3 if name == OURS else 2,
            )  # fmt: skip
        axis.set_title(cases.MASKS[chosen[0]["mask"]], fontsize=10)
        if is_log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:g}")
        _lengths_on_x(axis, chosen)
    figure.supylabel(label, fontsize=10)
    return _finish(figure, axes[: len(panels)], title)


def _grid(count: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with at least `count` panels."""
    from matplotlib.figure import Figure

    columns = min(columns, max(count, 1))
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(3.6 * columns, 2.7 * lines + 1.0), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def _finish(figure: Figure, used: list[Axes], title: str) -> Figure:
    """Hides the panels that are not used, and adds the title and one legend for all panels."""
    for axis in set(figure.axes) - set(used):
        axis.set_visible(False)
    handles = {}
    for axis in used:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(len(handles), int(figure.get_figwidth() / INCHES_OF_A_NAME))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _lengths_on_x(axis: Axes, rows: list[Row]) -> None:
    lengths = sorted(set(map(_length, rows)))
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("sequence length L", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _length(row: Row) -> int:
    return row["shape"][2]


def _slug(machine: str) -> str:
    """The name of a machine for a file name: "NVIDIA H200" becomes "nvidia-h200"."""
    return "-".join(re.findall(r"[^\W_]+", machine.lower()))
