from mlx_qwen35.bench.command import main

if __name__ == "__main__":
    main()
