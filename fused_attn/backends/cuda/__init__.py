"""The CUDA backend, for half precision on NVIDIA GPUs.

backend.py    the interface for `dispatch`: which problems the backend supports, forward and backward
hardware.py   the native module, and which of its kernels a GPU runs
splits.py     into how many parts the kernels divide their work
readable.py   the tensors of a call in the form that the kernels read
workspace.py  the memory of a call for intermediate results
"""
