"""Speed, memory and error of `fused_attn` and of other implementations: ``python -m benchmarks --help``.

A case is one attention problem: sizes, mask, dtype and direction. A rival is an implementation that is measured beside
`fused_attn`.

- cases.py: the cases, and how many floating-point operations each takes
- inputs.py: the tensors of a case
- rivals.py: the rivals, and how each is called
- accuracy.py: the error of a result against float64, and whether the result is wrong
- timing.py: seconds per call, with `fused_attn.measurement`
- machine.py: device and versions, which every row names; the device's matmul and copy rates
- conventions.py: names that the commands share with tools/gpu_suite
- session.py: what the commands that measure share: options, time limit, file of rows
- attention.py, generation.py, memory.py, modules.py: the commands that measure
- extras.py: further tables of attention.py for a CPU
- rows.py: results as JSON lines
- summary.py: ratios and groups of rows
- report.py, plots.py: the command that turns rows into RESULTS.md, plots, and the README's table
"""
