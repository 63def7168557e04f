"""Speed, memory and error of `fused_attn` and its rivals: ``python -m benchmarks --help``.

- cases.py: what is computed (sizes, mask, dtype, direction), and how many floating-point operations that takes
- inputs.py: the tensors of a case
- rivals.py: who computes it, and who cannot
- accuracy.py: how far results are from float64, and which are wrong
- timing.py: seconds per call, with `fused_attn.measurement`
- machine.py: what a reader must know to judge a figure; the device's matmul rate
- conventions.py, session.py: what the commands and the suite agree on, and what the commands share
- attention.py, extras.py, memory.py, modules.py: the commands that measure; extras.py has tables of attention.py
- rows.py: results as JSON lines
- summary.py: rows in a few lines of text
- report.py, plots.py: rows -> RESULTS.md, plots, and README's summary
- gpu_suite.py: all of it on a GPU, with one command
"""
