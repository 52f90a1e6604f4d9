"""Spatial parallelism: ranks divide the depth, height and width of images (Dryden et al. 2019).

Dryden, Maruyama, Benson, Moon, Snir, Van Essen 2019, "Improving strong-scaling of CNN training by
exploiting finer-grained parallelism". Each rank has a block of every activation and all weights. A
convolution gets the rim that it reads of neighbouring blocks, the halo, and its adjoint sends back
the gradients of that rim; gradients of weights are summed over the ranks as in data parallelism.

    division = divide(model, loss, Mesh(dp=2, sp_h=2, sp_w=2))
    loss = division.loss(model(x), target) for x, target = division.fields(batch, samples)

`hpcml.parallelize` does so with such a mesh. States are those of `hpcml.collectives`: activations
are `S` of space, after a "gather" `R`, after "samples" `S(0)`; parameters are `R`; the loss is `I`.
"""

from hpcml.parallel.spatial.grid import NAMES, Grid, ranks_of
from hpcml.parallel.spatial.loss import SpatialLoss
from hpcml.parallel.spatial.recipe import SpatialDivision, divide

__all__ = ["NAMES", "Grid", "SpatialDivision", "SpatialLoss", "divide", "ranks_of"]
