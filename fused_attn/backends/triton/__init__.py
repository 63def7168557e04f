"""The Triton backend. It supports every feature, on NVIDIA GPUs and on the CPU in Triton's interpreter.

backend.py         the interface for `dispatch`: which problems the backend supports, forward and backward
interpreter.py     whether Triton's interpreter is switched on
launcher.py        allocates results, chooses grids and launches the kernels
arguments.py       packs tensors and settings into the named tuples that the kernels take
configs.py         the package's tile sizes by kernel, architecture, head dim and dtype
tuned.py           tile sizes that were measured on the user's GPU and replace those of configs.py
tune.py            `python -m fused_attn tune`, which measures them
tiles.py           which block a program works on, which blocks it visits, loads and stores of tiles
pages.py           tiles of keys and values that lie in pages
scores.py          from the products of queries and keys to logits: scale, softcap, biases, masks; also dropout
sums.py            sums over blocks, compensated in float32
forward.py         the forward kernel
decode.py          splits the keys of one row among programs, and merges their results
backward.py        the kernels for dq (with delta and the gradient of the sinks) and for dk and dv
bias_gradients.py  the kernels for the gradients of attn_mask and relative_bias
"""
