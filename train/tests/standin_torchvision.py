"""Inside the stand-in for NGC's base, see standin.Dockerfile: make torchvision import, and lay its weights where torch looks."""

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

weights = Path("/opt/torch/hub/checkpoints/resnet18-f37072fd.pth")  # there is no network to download it
weights.parent.mkdir(parents=True)
torch.save(resnet18().state_dict(), weights)
