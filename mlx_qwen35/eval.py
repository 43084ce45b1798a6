"""`python -m mlx_qwen35.eval` is the command, which stands in evaluate/command.py."""

if __name__ == "__main__":
    from mlx_qwen35.evaluate.command import main

    main()
