"""`python -m mlx_qwen35.chat` is the command, which stands in commands/chat.py."""

if __name__ == "__main__":
    from mlx_qwen35.commands.chat import main

    main()
