"""Operations that a GPU kernel computes in one launch, each beside its definition in MLX operations.

Each module chooses between the two, and nothing else does.
"""
