"""Write tests/parity/golden/*.npz: what transformers answers for the cases of cases.py and vision_cases.py.

    python tests/parity/make_golden.py

Needs torch and transformers 5.23 (pip install "mlx-qwen35[parity]"). The tests that run beside transformers check that
the files are up to date. Those of video processing (vision-clips.*) are written where TORCHVISION names a folder with
torchvision, see video_reference.py.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import transformers
from parity import cases, reference, video_reference, vision_cases, vision_reference


def main() -> None:
    if video_reference.available():
        video_reference.run(cases.GOLDEN)
        print(f"{video_reference.JSON}, {video_reference.PIXELS}")
    else:
        print("vision-clips.*: left as they are, TORCHVISION is not set (see video_reference.py)")
    with tempfile.TemporaryDirectory() as scratch:
        for case in (*cases.CASES, cases.REAL_WIDTHS, cases.YARN, *vision_cases.CASES):
            folder = cases.write(case, Path(scratch) / case.name)
            answers = (reference if case.vision is None else vision_reference).answers(case, folder)
            cases.save(case, answers, cases.fingerprint(folder), transformers.__version__)
            print(f"{case.golden.name}: {len(answers)} answers, {case.golden.stat().st_size} bytes")


if __name__ == "__main__":
    main()
