"""What mlx.launch runs on every other machine for the option --with: python -m mlx_qwen35.distributed.seat"""

import signal

from mlx_qwen35.distributed.place import this_place
from mlx_qwen35.distributed.ranks import serve


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that the user started
    place = this_place()
    assert place, "mlx.launch has started this"
    serve(place)


if __name__ == "__main__":
    main()
