from mlx_qwen35.doctor.command import main

if __name__ == "__main__":
    main()
