"""The native ops: typed wrappers, fakes, autograd and plain-PyTorch twins, one file per family."""

from . import cuda  # noqa: F401 - the ops' CUDA side, or the sentence that says there is none
