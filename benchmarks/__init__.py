"""Speed, memory and error of `fused_attn` and its rivals: ``python -m benchmarks --help``.

cases.py        what is computed: sizes, mask, dtype, direction; floating-point operations
inputs.py       the tensors of a case
rivals.py       who computes it, and who cannot
accuracy.py     how far results are from float64, and which are wrong
timing.py       seconds per call, on a CPU and on a GPU
machine.py      what a reader must know to judge a figure; the device's matmul rate
rows.py         results as JSON lines
summary.py      rows in a few lines of text
conventions.py  what the commands and the suite agree on
cpu.py, attention.py, modules.py, memory.py   the commands that measure
cpu_tables.py   what cpu.py measures beside the table of masks
report.py, plots.py                           rows -> tables and plots
gpu_suite.py    one command that turns a GPU into evidence
"""
