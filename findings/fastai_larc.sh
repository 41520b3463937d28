#!/usr/bin/env bash
# fastai 2.8.12, torch 2.14.1, torchvision 0.29.1 (Python 3.11).
# fastai's Larc multiplies each step by the norm of the weight, so whatever starts at zero stays
# zero. fastai's own xresnet starts the last batch norm of each residual branch at zero: under
# Larc all its branches stay off for good, and what is trained is the shortcuts.
# Seen: SGD: 8 branches begin at zero, 0 are there after 5 steps
#       Larc: 8 branches begin at zero, 8 are there after 5 steps
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q --no-compile fastai==2.8.12 \
    torch==2.14.1 torchvision==0.29.1
cd "$dir"
env/bin/python -W ignore - <<'PY' | tee seen
import torch, torch.nn.functional as F
from fastai.optimizer import Larc, SGD
from fastai.vision.models.xresnet import xresnet18
from torch import nn
def zeros(net):
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    return sum(not m.weight.any() for m in norms)
for opt_func in (SGD, Larc):
    torch.manual_seed(0)
    net, x, y = xresnet18(n_out=3), torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    opt, before = opt_func(net.parameters(), lr=.1), zeros(net)
    for _ in range(5):
        F.cross_entropy(net(x), y).backward()
        opt.step(); opt.zero_grad()
    print(f'{opt_func.__name__}: {before} branches begin at zero, '
          f'{zeros(net)} are there after 5 steps')
PY
diff - seen <<'SEEN'
SGD: 8 branches begin at zero, 0 are there after 5 steps
Larc: 8 branches begin at zero, 8 are there after 5 steps
SEEN
