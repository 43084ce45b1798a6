"""What mlx.launch runs on every other machine for the option --with: python -m mlx_qwen35.distributed.seat"""

import sys

from mlx_qwen35.distributed.place import this_place
from mlx_qwen35.distributed.ranks import serve
from mlx_qwen35.errors import InputError


def main() -> None:
    try:
        place = this_place()
        assert place, "mlx.launch has started this"
        serve(place)
    except InputError as error:
        sys.exit(str(error))  # rank 0 tells the last line that comes from here


if __name__ == "__main__":
    main()
