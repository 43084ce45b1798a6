from mlx_qwen35.train.command import main

if __name__ == "__main__":
    main()
