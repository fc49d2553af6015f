"""Operations of a model with both scans and attention."""

import torch
from torch import nn

from ssmgen.models.summary import SCAN_FLOPS, count_operations
from ssmgen.nn import SelfAttention, SelfMamba

DIM, SIZE = 32, (4, 6)
TOKENS = SIZE[0] * SIZE[1]


class Hybrid(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([SelfMamba(DIM), SelfAttention(DIM, 4), SelfMamba(DIM, order="column")])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, SIZE)
        return x


def test_a_hybrid_counts_the_products_of_both():
    with torch.device("meta"):
        model = Hybrid()
        matrix, scan = count_operations(model, torch.zeros(1, TOKENS, DIM))
    mamba, attention = model.layers[0], model.layers[1]
    inner, states = mamba.ssm.d_inner, mamba.ssm.d_state
    linear = [mamba.in_proj, mamba.x_proj, mamba.ssm.dt_proj, mamba.ssm.out_proj]
    weights = 2 * sum(layer.weight.numel() for layer in [*linear, mamba.ssm.conv])
    weights += attention.qkv.weight.numel() + attention.out_proj.weight.numel()
    assert matrix == 2 * TOKENS * weights + 2 * 2 * TOKENS**2 * DIM
    assert scan == 2 * SCAN_FLOPS * TOKENS * inner * states
    assert "scan" not in vars(mamba.ssm), "the scan is put back"
