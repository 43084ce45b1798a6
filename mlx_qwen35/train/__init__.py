"""mlx_qwen35.train: LoRA and QLoRA adapters for a model, trained on a folder of rows."""
