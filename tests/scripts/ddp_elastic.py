"""A script for torchrun: DDP over backend "elastic", named and nothing more (or after the imports it is told)."""

import importlib
import sys

import torch
import torch.distributed as dist
from torch import nn

for module in sys.argv[1:]:
    importlib.import_module(module)
dist.init_process_group("elastic")
torch.manual_seed(dist.get_rank())
model = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
dist.all_gather(all_of_them, mine)
assert all(torch.equal(mine, other) for other in all_of_them)
print(f"weights agree over {dist.get_backend()}", flush=True)
dist.destroy_process_group()
