from mlx_qwen35.commands.generate import main

if __name__ == "__main__":
    main()
