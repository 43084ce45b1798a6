"""Backends as the tests of kernels need them."""

from dataclasses import replace

from mlx_qwen35.backend import backend

EMULATED = replace(backend(), kernel_language="metal", joins_projections=True)  # this machine, emulating
OPERATIONS = replace(backend(), kernel_language="")  # this machine, without kernels
