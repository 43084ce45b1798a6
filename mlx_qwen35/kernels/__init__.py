"""The operations that a Metal kernel does in one launch, each beside its plain-MLX reference.

Which of the two runs is decided here and nowhere else.
"""
