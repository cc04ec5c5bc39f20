"""Print the versions of the base image's packages that must stay, as constraints for pip.

Not from `pip freeze`: what was installed from a local wheel stands there as `torch @ file:///...`.
"""

from importlib.metadata import version

for name in ("torch", "torchvision", "numpy", "pillow"):
    print(f"{name}=={version(name)}")
