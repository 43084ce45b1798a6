"""`python -m mlx_qwen35.serve` is the command, which stands in commands/serve.py."""

if __name__ == "__main__":
    from mlx_qwen35.commands.serve import main

    main()
