"""The differentiable operations, by kind; `autograd.operators` gives tensors their names."""
