"""The differentiable operations, by kind; `hpcml.autograd.methods` gives tensors their operators."""
