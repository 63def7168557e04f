"""Plots of rows: speed and memory against length, with a line for each implementation or mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import cases, summary
from benchmarks.conventions import OURS
from benchmarks.rows import Row, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "none": "no mask",
    "causal": "causal",
    "padded": "half padded",
    "padded-random": "padded, random lengths",
    "causal+padded": "causal + half padded",
    "causal+padded-random": "causal + padded, random lengths",
    "bias": "bias with gradient",
    "relative-bias": "relative bias with gradient",
    "window": "causal, window 1024",
    "gqa": "causal, GQA",
    "varlen": "causal, packed",
    "decode": "decode",
}
#: The same colour for the same implementation in every plot; ours stands out.
COLOURS = {
    "fused_attn": "#c1272d",
    "fused_attn[triton]": "#ff6f69",
    "fused_attn[cuda]": "#7a0c12",
    "torch": "#1f77b4",
    "torch-flash": "#17becf",
    "torch-efficient": "#2ca02c",
    "torch-cudnn": "#9467bd",
    "torch-math": "#7f7f7f",
    "torch-causal-only": "#87ceeb",
    "torch-varlen": "#8c564b",
    "flex": "#ff7f0e",
    "flash_attn2": "#bcbd22",
    "flash_attn3": "#556b2f",
    "flash_attn4": "#000080",
    "flash_attn3-packed": "#8fbc8f",
    "flash_attn4-packed": "#4169e1",
}
HEAD_DIM = 64
INCHES_OF_A_NAME = 1.9  # in a legend
LEAST_MIB = 0.1  # where a logarithmic axis begins


class Plot(NamedTuple):
    """rows: what it shows; draw: rows -> figure."""

    title: str
    rows: list[Row]
    draw: Callable[[list[Row], str], Figure]


def draw_all(rows: Iterable[Row], folder: Path) -> list[Path]:
    """One file for each kind of plot and device that there are rows of."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in plots_of(rows).items():
        path = folder / f"{name}.png"
        # No date inside, so that the same rows give the same file.
        plot.draw(plot.rows, plot.rows[0]["device"]).savefig(path, dpi=110, metadata={"Software": None})
        written.append(path)
    return written


def plots_of(rows: Iterable[Row]) -> dict[str, Plot]:
    """The plots that can be made of these rows, by file name."""
    plots = {}
    rows = list(rows)
    devices = list(dict.fromkeys(row["device"] for row in rows))
    slugs = [_slug(device) for device in devices]
    for number, (device, slug) in enumerate(zip(devices, slugs, strict=True)):
        if slug in slugs[:number]:
            raise ValueError(f"device: expected names that differ in letters and digits, got {devices}")
        own = select(rows, device=device)
        if found := select(own, benchmark="masks", implementation="torch"):
            title = f"Speed-up over F.scaled_dot_product_attention against length, {device}"
            plots[f"speedup-{slug}"] = Plot(title, found, _speedup)
        attention = [row for row in select(own, benchmark="attention") if has_enough_sequences(row)]
        for direction in dict.fromkeys(row["direction"] for row in attention):
            title = f"FLOP/s on visible scores against length, {direction}, {device}"
            name = f"speed-{slug}-{direction.replace('+', '-')}"
            plots[name] = Plot(title, select(attention, direction=direction), _speed)
        if found := [row for row in sweep_of_memory(own) if "table" not in row]:
            title = f"Memory beyond inputs and results against length, {device}"
            plots[f"memory-{slug}"] = Plot(title, found, _memory)
    return plots


def has_enough_sequences(row: Row) -> bool:
    """False if lengths are random and the batch has so few sequences that chance decides the result."""
    return row["mask"] not in cases.RANDOM_MASKS or row["shape"][0] >= cases.LEAST_SEQUENCES


def sweep_of_memory(rows: Iterable[Row]) -> list[Row]:
    """The rows that have the (B, H, D) of the first one."""
    rows = [row for row in select(rows, benchmark="memory") if "extra_mib" in row]
    sizes = [(row["shape"][0], row["shape"][1], row["shape"][3]) for row in rows]
    return [row for row, size in zip(rows, sizes, strict=True) if size == sizes[0]]


def _speedup(rows: list[Row], device: str):
    """Panels by dtype and direction, a line for each mask: each ratio with its quartiles."""
    rows = [row for row in rows if "over_ours" in row and row["shape"][3] == HEAD_DIM]
    panels = list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows))
    figure, axes = _grid(len(panels), 2)
    for axis, (dtype, direction) in zip(axes, panels, strict=False):
        chosen = select(rows, dtype=dtype, direction=direction)
        for mask in dict.fromkeys(row["mask"] for row in chosen):
            points = sorted(select(chosen, mask=mask), key=lambda row: row["shape"][2])
            lengths = [row["shape"][2] for row in points]
            line = axis.plot(lengths, [row["over_ours"] for row in points], marker="o", ms=4, label=TITLES[mask])[0]
            quartiles = [row["over_ours_q1"] for row in points], [row["over_ours_q3"] for row in points]
            axis.fill_between(lengths, *quartiles, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.axhline(1.0, color="black", linewidth=1, linestyle=":")
        axis.set_title(f"{dtype}, {direction}", fontsize=10)
        axis.set_yscale("log", base=2)
        _lengths_on_x(axis, chosen)
        _plain_numbers(axis.yaxis, "{:g}x")
    figure.supylabel("torch's time / ours; shaded: quartiles over rounds", fontsize=10)
    return _finish(
        figure, axes, len(panels), f"Speed-up over F.scaled_dot_product_attention, head dim {HEAD_DIM}\n{device}"
    )


def _memory(rows: list[Row], device: str):
    """Panels by mask, of a training step where there is one; a line for each implementation."""
    directions = {row["direction"] for row in rows}
    direction = "forward+backward" if "forward+backward" in directions else next(iter(directions))
    dtype = rows[0]["dtype"]
    rows = [row for row in rows if row["direction"] == direction and row["dtype"] == dtype]
    batch, heads, _, head_dim = rows[0]["shape"]
    title = f"Memory of one call, {direction}, ({batch}, {heads}, L, {head_dim}), {dtype}\n{device}"
    label = "MiB beyond inputs and results; needed masks count"
    return _by_implementation(rows, lambda row: max(summary.mib_of(row), LEAST_MIB), label, title, is_log=True)


def _speed(rows: list[Row], device: str):
    """Panels by mask, of the dtype and head dim with most rows."""
    timed = [row for row in rows if "median_ms" in row]
    sizes = [(row["dtype"], row["shape"][3]) for row in timed]
    dtype, head_dim = max(dict.fromkeys(sizes), key=sizes.count)
    chosen = [row for row in timed if (row["dtype"], row["shape"][3]) == (dtype, head_dim)]
    title = f"Speed on visible scores, {rows[0]['direction']}, {dtype}, head dim {head_dim}"
    tokens = {row["shape"][0] * row["shape"][2] for row in chosen}
    if len(tokens) == 1:
        title += f", {tokens.pop()} tokens a batch"
    is_slow = max(row["effective_tflops"] for row in chosen) < 1.0
    unit, scale = ("GFLOP/s", 1e3) if is_slow else ("TFLOP/s", 1.0)
    return _by_implementation(
        chosen, lambda row: scale * row["effective_tflops"], f"{unit} on visible scores", f"{title}\n{device}"
    )


def _by_implementation(rows: list[Row], value_of: Callable[[Row], float], label: str, title: str, is_log: bool = False):
    """An implementation that solves another problem than its panel's is dashed and has a * after its name."""
    masks = list(dict.fromkeys(row["mask"] for row in rows))
    figure, axes = _grid(len(masks), 3)
    for axis, mask in zip(axes, masks, strict=False):
        chosen = select(rows, mask=mask)
        for name in dict.fromkeys(row["implementation"] for row in chosen):
            points = sorted(select(chosen, implementation=name), key=lambda row: row["shape"][2])
            is_other = any("problem" in row for row in points)
            axis.plot(
                [row["shape"][2] for row in points], list(map(value_of, points)), marker="o", ms=4,
                label=f"{name} *" if is_other else name, color=COLOURS[name], linestyle="--" if is_other else "-",
                linewidth=2.5 if name == OURS else 1.5, zorder=3 if name == OURS else 2,
            )  # fmt: skip
        axis.set_title(TITLES[mask], fontsize=10)
        if is_log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        _plain_numbers(axis.yaxis, "{:g}")
        _lengths_on_x(axis, chosen)
    figure.supylabel(label, fontsize=10)
    if any("problem" in row for row in rows):
        title += "\n* computes less than the case: right only in rows that are no padding"
    return _finish(figure, axes, len(masks), title)


def _grid(count: int, columns: int):
    from matplotlib.figure import Figure

    columns = min(columns, max(count, 1))
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(3.6 * columns, 2.7 * lines + 1.0), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def _finish(figure, axes: list[Axes], used: int, title: str):
    """One legend below for all panels."""
    for axis in axes[used:]:
        axis.set_visible(False)
    handles = {}
    for axis in axes[:used]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(len(handles), int(figure.get_figwidth() / INCHES_OF_A_NAME))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _lengths_on_x(axis: Axes, rows: list[Row]) -> None:
    lengths = sorted({row["shape"][2] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("sequence length L", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def _plain_numbers(axis, pattern: str) -> None:
    axis.set_major_formatter(lambda value, _: pattern.format(value))


def _slug(device: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
