"""The tests import the modules of train/ as its scripts do."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else a thread that waits takes the core of the other test
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it: as many tests run at once as there are cores

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # PyPI's is built for CUDA: beside a torch for the CPU it lacks two operators that its import describes
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [module for module in sys.modules if module.startswith("torchvision")]:
        del sys.modules[name]
