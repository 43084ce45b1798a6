"""Write tests/parity/golden/*.npz: what transformers answers for the cases of cases.py.

    python tests/parity/make_golden.py

Needs torch and transformers 5.23 (pip install "mlx-qwen35[parity]"). The tests that run beside transformers check that
the files are up to date.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import transformers
from parity import cases, reference


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for case in (*cases.CASES, cases.REAL_WIDTHS):
            folder = cases.write(case, Path(scratch) / case.name)
            answers = reference.answers(case, folder)
            cases.save(case, answers, cases.fingerprint(folder), transformers.__version__)
            print(f"{case.golden.name}: {len(answers)} answers, {case.golden.stat().st_size} bytes")


if __name__ == "__main__":
    main()
