"""Print the versions of the base image's packages that must not change, as constraints for pip.

Not `pip freeze`: it prints packages from local wheels as `torch @ file:///...`.
"""

from importlib.metadata import version

for name in ("torch", "torchvision", "numpy", "pillow"):
    print(f"{name}=={version(name)}")
