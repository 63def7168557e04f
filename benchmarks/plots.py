"""Plots of committed rows: speed and memory against length, one line an implementation (or a mask)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rows import Row, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    "torch": "#1f77b4",
    "torch-flash": "#17becf",
    "torch-efficient": "#2ca02c",
    "torch-cudnn": "#9467bd",
    "torch-math": "#7f7f7f",
    "torch-varlen": "#8c564b",
    "flex": "#ff7f0e",
    "flash_attn2": "#bcbd22",
    "flash_attn3": "#556b2f",
    "flash_attn4": "#000080",
    "xformers": "#e377c2",
}
HEAD_DIM = 64
LEAST_MIB = 0.1  # where a logarithmic axis begins


def draw_all(rows: Iterable[Row], folder: Path) -> list[Path]:
    """One file for each kind of plot and device that there are rows of."""
    import matplotlib

    matplotlib.use("Agg")
    rows = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in _figures(rows):
        path = folder / f"{name}.png"
        # No date inside, so that the same rows give the same file.
        figure.savefig(path, dpi=110, metadata={"Software": None})
        written.append(path)
    return written


def names_of(rows: Iterable[Row]) -> dict[str, str]:
    """File name -> what it shows, of the plots that these rows give."""
    names = {}
    rows = list(rows)
    for device in dict.fromkeys(row["device"] for row in rows):
        own = select(rows, device=device)
        slug = _slug(device)
        if select(own, benchmark="cpu"):
            names[f"speedup-{slug}"] = f"Speed-up over F.scaled_dot_product_attention against length, {device}"
        for direction in dict.fromkeys(row["direction"] for row in own if row["benchmark"] == "attention"):
            name = f"speed-{slug}-{direction.replace('+', '-')}"
            names[name] = f"Effective TFLOP/s against length, {direction}, {device}"
        if select(own, benchmark="memory"):
            names[f"memory-{slug}"] = f"Memory beyond inputs and results against length, {device}"
    return names


def _figures(rows: list[Row]):
    for name in names_of(rows):
        kind, _, rest = name.partition("-")
        device = next(row["device"] for row in rows if rest.startswith(_slug(row["device"])))
        own = select(rows, device=device)
        if kind == "speedup":
            yield name, _speedup(select(own, benchmark="cpu"), device)
        elif kind == "memory":
            yield name, _memory(select(own, benchmark="memory"), device)
        else:
            direction = rest.removeprefix(f"{_slug(device)}-").replace("forward-backward", "forward+backward")
            yield name, _speed(select(own, benchmark="attention", direction=direction), f"{direction}, {device}")


def _speedup(rows: list[Row], device: str):
    """Panels by dtype and direction, a line for each mask: each ratio with its quartiles."""
    rows = [row for row in rows if "ratio" in row and row["shape"][3] == HEAD_DIM]
    panels = list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows))
    figure, axes = _grid(len(panels), 2)
    for axis, (dtype, direction) in zip(axes, panels, strict=False):
        chosen = select(rows, dtype=dtype, direction=direction)
        for mask in dict.fromkeys(row["mask"] for row in chosen):
            points = sorted(select(chosen, mask=mask), key=lambda row: row["shape"][2])
            lengths = [row["shape"][2] for row in points]
            line = axis.plot(lengths, [row["ratio"] for row in points], marker="o", ms=4, label=TITLES[mask])[0]
            quartiles = [row["ratio_q1"] for row in points], [row["ratio_q3"] for row in points]
            axis.fill_between(lengths, *quartiles, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.axhline(1.0, color="black", linewidth=1, linestyle=":")
        axis.set_title(f"{dtype}, {direction}", fontsize=10)
        axis.set_yscale("log", base=2)
        _lengths_on_x(axis, chosen)
        _plain_numbers(axis.yaxis, "{:g}x")
    figure.supylabel("torch's time / ours", fontsize=10)
    return _finish(
        figure, axes, len(panels), f"Speed-up over F.scaled_dot_product_attention, head dim {HEAD_DIM}\n{device}"
    )


def _memory(rows: list[Row], device: str):
    """Panels by mask, of a training step where there is one; a line for each implementation."""
    directions = {row["direction"] for row in rows}
    direction = "forward+backward" if "forward+backward" in directions else next(iter(directions))
    rows = [row for row in rows if row["direction"] == direction and "extra_mib" in row]
    batch, heads, _, head_dim = rows[0]["shape"]
    title = f"Memory of one call, {direction}, ({batch}, {heads}, L, {head_dim}), {rows[0]['dtype']}\n{device}"
    return _by_implementation(rows, "extra_mib", "MiB beyond inputs and results", title, LEAST_MIB)


def _speed(rows: list[Row], title: str):
    """Panels by mask, of the dtype and head dim with most rows."""
    timed = [row for row in rows if "median_ms" in row]
    sizes = [(row["dtype"], row["shape"][3]) for row in timed]
    dtype, head_dim = max(dict.fromkeys(sizes), key=sizes.count)
    chosen = [row for row in timed if (row["dtype"], row["shape"][3]) == (dtype, head_dim)]
    title = f"Speed on visible scores, {dtype}, head dim {head_dim}, {title}"
    return _by_implementation(chosen, "effective_tflops", "effective TFLOP/s", title)


def _by_implementation(rows: list[Row], field: str, label: str, title: str, least: float | None = None):
    """least: smaller values are drawn there, and the axis is logarithmic."""
    masks = list(dict.fromkeys(row["mask"] for row in rows))
    figure, axes = _grid(len(masks), 3)
    for axis, mask in zip(axes, masks, strict=False):
        chosen = select(rows, mask=mask)
        for name in dict.fromkeys(row["implementation"] for row in chosen):
            points = sorted(select(chosen, implementation=name), key=lambda row: row["shape"][2])
            values = [row[field] if least is None else max(row[field], least) for row in points]
            axis.plot(
                [row["shape"][2] for row in points], values, marker="o", ms=4, label=name, color=COLOURS[name],
                linewidth=2.5 if name == "fused_attn" else 1.5,
            )  # fmt: skip
        axis.set_title(TITLES[mask], fontsize=10)
        if least is not None:
            axis.set_yscale("log")
            _plain_numbers(axis.yaxis, "{:g}")
        else:
            axis.set_ylim(bottom=0)
        _lengths_on_x(axis, chosen)
    figure.supylabel(label, fontsize=10)
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
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), fontsize=9)
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
