"""Curvature and per-sample gradient norms in one backward pass; the smallest example.

The network has a residual connection and functional attention, which the library needs no rule for.
"""

import torch
from torch import nn
from torch.nn import functional as F

from backpack_ext import KFAC, BatchL2Grad, backpack, extend


class Attention(nn.Module):
    """Two linear layers around functional self-attention, with a residual connection."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):
        """Map ``[N, tokens, 6]`` to ``[N, 3]``."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return self.head(x.mean(dim=1))


torch.manual_seed(0)
model, loss_fn = extend(Attention()), extend(nn.CrossEntropyLoss())
X, y = torch.randn(4, 10, 6), torch.tensor([0, 1, 2, 0])

with backpack(KFAC(approx="reduce", fisher="exact"), BatchL2Grad()):
    loss_fn(model(X), y).backward()

for name, parameter in model.named_parameters():
    norms = parameter.batch_l2.sqrt().tolist()
    print(f"{name:11} {parameter.kfac}  gradient norms", *(f"{norm:.2f}" for norm in norms))

B, A = model.head.weight.kfac
print(f"head.weight: tr B = {B.trace():.3f}, tr A = {A.trace():.3f}")
