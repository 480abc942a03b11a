"""The native ops: typed wrappers, fakes, autograd and plain-PyTorch twins, one file per family."""
