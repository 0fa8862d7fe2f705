"""A small model with its optimizer, and checkpointers that save it."""

import threading

import torch
from torch import nn

from cherry.checkpoint.checkpointer import Checkpointer


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def saver_of(directory, group, *, kind=Checkpointer, keep_last=2, asynchronous=True, fence=None, **options):
    return kind(str(directory), keep_last=keep_last, asynchronous=asynchronous, group=group, fence=fence, **options)


class HeldCheckpointer(Checkpointer):
    """Begins to write only when the test says so."""

    def __init__(self, *args, **options):
        self.go = threading.Event()
        super().__init__(*args, **options)

    def _writer(self, target):
        assert self.go.wait(60)
        return super()._writer(target)
