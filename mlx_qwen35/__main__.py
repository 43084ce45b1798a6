"""`python -m mlx_qwen35` is the command mlx_qwen35, which stands in commands/umbrella.py."""

from mlx_qwen35.commands.umbrella import main

if __name__ == "__main__":
    main()
