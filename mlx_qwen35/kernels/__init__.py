"""The operations that a kernel of our own does in one launch on a GPU, each beside its definition in MLX operations.

Which of the two runs is decided here and nowhere else. `<name>.metal` is a kernel's text for both kinds of GPU;
fused.py launches and checks it; cpu.py has what only a CPU needs.
"""
