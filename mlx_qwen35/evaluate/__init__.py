"""mlx_qwen35.eval: how well a model answers, by one command."""
