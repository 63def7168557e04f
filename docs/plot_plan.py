"""Writes the plans of docs/distributed.md: two tables between its markers, and docs/plan.png.

    pip install -e .[examples]
    python docs/plot_plan.py

The plans are what ``python -m fused_attn.distributed plan`` prints. The measured times are rows in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path

from fused_attn.distributed import quantities
from fused_attn.distributed.__main__ import main as run
from fused_attn.distributed.rates import ROWS

PAGE = Path(__file__).parent / "distributed.md"
#: Rows of `python -m benchmarks distributed`.
MEASURED = ROWS / "distributed-cpu.jsonl"
TOKENS = "4M"
GPUS = (64, 128, 256, 512, 1024)
#: The lines of the plot: the label, and which methods it shows the fastest of.
LINES = {
    "ring": lambda x: x["ulysses"] == 1,
    "ring x ulysses 8": lambda x: x["ulysses"] == 8,
    "best nesting": lambda x: x["ulysses"] > 1,
}


def plan(gpus: int) -> dict:
    """What the command prints with --json."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run(["plan", "--gpus", str(gpus), "--tokens", TOKENS, "--json"])
    return json.loads(printed.getvalue())


def curve_line(found: dict) -> str:
    """The line of the first table about one number of GPUs."""
    best = found["methods"][0]
    kernels = best["forward"]["kernels"] + best["backward"]["kernels"]
    exposed = best["forward"]["exposed"] + best["backward"]["exposed"]

    def seconds(name: str) -> str:
        return next(quantities.in_seconds(x["seconds"]) for x in found["methods"] if LINES[name](x))

    cells = [
        str(found["gpus"]), *map(seconds, ("ring", "ring x ulysses 8")), quantities.in_seconds(best["seconds"]),
        best["method"], f"{kernels / best['seconds']:.0%}", f"{exposed / best['seconds']:.1%}",
        quantities.in_bytes(best["sent_forward_bytes"] + best["sent_backward_bytes"]),
        quantities.in_bytes(best["saved_bytes"] + best["buffer_bytes"]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def curve(plans: list[dict]) -> str:
    head = "| GPUs | ring | ring x ulysses 8 | best | method | kernels | exposed | sent | memory |"
    return "\n".join([head, "|---" * head.count(" | ") + "|---|", *map(curve_line, plans)])


def check() -> str:
    """The table of predicted and measured times, from the committed rows."""
    rows = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    first = rows[0]
    lines = [
        f"{first['device']}, {first['cores']} cores, {first['isa']}; (B, H, L, D) = {tuple(first['shape'])}, "
        f"{first['kv_heads']} key heads, causal, {first['dtype']}; commit {first['commit']}, {first['date'][:10]}.",
        "",
        "| processes | method | direction | predicted | measured | predicted / measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["processes"], row["table"], row["direction"]]
        cells += [f"{row[name]:.0f} ms" for name in ("predicted_ms", "p20_ms")]
        cells.append(f"{row['predicted_ms'] / row['p20_ms']:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def with_table(page: str, name: str, table: str) -> str:
    """The text of the page with this table between the markers of this name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, rest = page.split(begin)
    return f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def draw(plans: list[dict], path: Path) -> None:
    """GPU-seconds of attention against the number of GPUs. Perfect scaling is a horizontal line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, is_shown in LINES.items():
        points = [(x["gpus"], x["gpus"] * min(y["seconds"] for y in x["methods"] if is_shown(y))) for x in plans]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, list(map(str, GPUS)))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="GPUs", ylabel="GPUs x seconds of a step", title=f"Planned attention of {TOKENS} tokens on H100")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-plot", action="store_true", help="write the tables only, without matplotlib")
    arguments = parser.parse_args(argv)
    plans = [plan(gpus) for gpus in GPUS]
    page = with_table(PAGE.read_text(), "plan:curve", curve(plans))
    if MEASURED.exists():
        page = with_table(page, "plan:check", check())
    PAGE.write_text(page)
    if not arguments.no_plot:
        draw(plans, PAGE.parent / "plan.png")


if __name__ == "__main__":
    main()
