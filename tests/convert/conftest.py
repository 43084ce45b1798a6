"""The converter's tests share converting.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # last: the conftest above is the one to import
