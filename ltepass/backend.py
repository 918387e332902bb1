"""Where the torch.compile backend "lte" was; entry points of older installs name it."""

from ltepass.passes.lower.compile_backend import lte as lte
