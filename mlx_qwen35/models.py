"""`python -m mlx_qwen35.models` is the command, which stands in commands/models.py."""

if __name__ == "__main__":
    from mlx_qwen35.commands.models import main

    main()
