"""Backends as the tests of kernels need them."""

from dataclasses import replace

from mlx_qwen35.backend import CPU, METAL, backend

EMULATED = replace(CPU, kernel_language="metal", joins_projections=True)  # the CPU, with the emulator's kernels
OPERATIONS = replace(backend(), kernel_language="")  # this machine, without kernels
UNCHECKED = replace(METAL, checks_kernels=False)  # a Mac whose kernels agree; for graphs that are not computed
