"""Communication: meshes of ranks, the operations along their axes, and the ledger of what moved.

mpi4py is imported in this package alone, when the first mesh is made.
"""

from __future__ import annotations

from hpcml.comm.algorithms import algorithm
from hpcml.comm.axis import Axis
from hpcml.comm.halo import Halo
from hpcml.comm.halo_plan import Cut
from hpcml.comm.ledger import Count, Ledger, Tally
from hpcml.comm.mesh import Mesh
from hpcml.comm.request import Request
from hpcml.comm.threads import run

__all__ = ["Axis", "Count", "Cut", "Halo", "Ledger", "Mesh", "Request", "Tally", "algorithm", "run"]
