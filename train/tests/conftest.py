"""The tests import the modules of train/ as its scripts do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
