"""Examples are scripts that import each other by their bare names, as Python does for the folder of a script it runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
