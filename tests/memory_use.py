"""How much memory MLX's arrays take."""

import gc

import mlx.core as mx


def active() -> int:
    """Bytes of all arrays that somebody holds, once the device has nothing to do."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory()
