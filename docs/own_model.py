"""A model, a data set and a loop of your own, serial or parallel without touching the model.

python docs/own_model.py    or    mpiexec -n 2 python docs/own_model.py
"""

import numpy as np

import hpcml
from hpcml import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        return self.head(self.layers(x))


class Spirals:
    """Points on two spirals, to be told apart; sample i is a point and its spiral."""

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        radius, label = 0.2 + i / 1250, i % 2
        angle = 8 * radius + np.pi * label
        return np.array([radius * np.cos(angle), radius * np.sin(angle)]), label


mesh = hpcml.Mesh()
step = hpcml.parallelize(
    Net(), loss=nn.CrossEntropyLoss(), optimizer=hpcml.optim.AdamW, lr=1e-2, mesh=mesh
)
for number, batch in enumerate(hpcml.data.Batches(Spirals(), 50, seed=0, steps=200)):
    loss = step(batch)
    if mesh.rank == 0 and number % 40 == 39:
        print(f"step {number + 1}  loss {loss:.6f}")
