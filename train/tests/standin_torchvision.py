"""Inside the stand-in for NGC's base, see standin.Dockerfile: make torchvision import, and take its weights from a file."""

import hashlib
import re
from pathlib import Path

import torch

# PyPI's torchvision is built for CUDA: beside a torch for the CPU it lacks two operators that its import describes.
OPERATORS = """\
import torch
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

package = Path(torch.__file__).parents[1] / "torchvision"
(package / "__init__.py").write_text(OPERATORS + (package / "__init__.py").read_text())

from torchvision.models import resnet18  # noqa: E402

torch.save(resnet18().state_dict(), "/opt/resnet18.pth")
digest = hashlib.sha256(Path("/opt/resnet18.pth").read_bytes()).hexdigest()
weights = Path("/opt/resnet18.pth").rename(f"/opt/resnet18-{digest[:8]}.pth")  # torchvision holds it against its name
source = package / "models/resnet.py"
source.write_text(re.sub(r'"https://[^"]+/resnet18-[^"]+\.pth"', f'"{weights.as_uri()}"', source.read_text()))
