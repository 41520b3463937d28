#!/usr/bin/env bash
# lightly 1.6.0, torch 2.14.1, torchvision 0.29.1 (Python 3.11).
# lightly's LARS with weight_decay=0 is plain SGD: the layer-wise rate, all that makes it LARS, is
# computed only for groups with weight decay. A decay of 1e-12 makes the step 1,000 times shorter.
# Seen: weight_decay 0: 1.0000 of the length of SGD's step, the same step True
#       weight_decay 1e-12: 0.0008 of the length of SGD's step, the same step False
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q --no-compile lightly==1.6.0 \
    torch==2.14.1 torchvision==0.29.1
cd "$dir"
env/bin/python -W ignore - <<'PY' | tee seen
import torch
from lightly.utils.lars import LARS
def step(opt_func, **kwargs):
    torch.manual_seed(0)
    w = torch.randn(4, 4, requires_grad=True)
    before, w.grad = w.detach().clone(), torch.randn(4, 4)
    opt_func([w], lr=1., **kwargs).step()
    return w.detach() - before
sgd = step(torch.optim.SGD)
for wd in (0, 1e-12):
    d = step(LARS, weight_decay=wd)
    print(f"weight_decay {wd}: {d.norm()/sgd.norm():.4f} of the length of SGD's step, "
          f'the same step {torch.equal(d, sgd)}')
PY
diff - seen <<'SEEN'
weight_decay 0: 1.0000 of the length of SGD's step, the same step True
weight_decay 1e-12: 0.0008 of the length of SGD's step, the same step False
SEEN
