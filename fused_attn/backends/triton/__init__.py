"""The Triton kernels: every feature, on NVIDIA GPUs, or on the CPU in Triton's interpreter.

backend.py         what it can run
interpreter.py     whether kernels run in Python
launcher.py        allocates, chooses grids, launches
arguments.py       tensors -> the tuples that kernels read
configs.py         tile sizes by kernel, architecture, head dim and dtype
tiles.py           which blocks a program visits, how tiles are read
scores.py          scale, soft cap, biases, masks, dropout
forward.py         the forward kernel
decode.py          joins programs that shared the keys of one head
backward.py        dq and delta; dk and dv
bias_gradients.py  gradients of attn_mask and relative_bias
"""
