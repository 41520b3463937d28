#!/usr/bin/env bash
# torch 2.14.1, numpy 2.4.6 (Python 3.11).
# Starting to iterate over a DataLoader draws from PyTorch's global generator, even without workers
# and without shuffling. So one look at a validation set in the middle of a training changes the
# order, crops and dropout of everything after it. A `generator=` of the loader's own prevents it.
# Seen: the same numbers after a look at a loader: False
#       with a generator of its own: True
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q --no-compile torch==2.14.1 numpy==2.4.6
cd "$dir"
env/bin/python -W ignore - <<'PY' | tee seen
import torch
from torch.utils.data import DataLoader
def numbers_after(**kwargs):
    torch.manual_seed(0)
    list(DataLoader(range(4), shuffle=False, num_workers=0, **kwargs))
    return torch.rand(3)
torch.manual_seed(0)
expected = torch.rand(3)
print('the same numbers after a look at a loader:', torch.equal(numbers_after(), expected))
own = torch.Generator().manual_seed(1)
print('with a generator of its own:', torch.equal(numbers_after(generator=own), expected))
PY
diff - seen <<'SEEN'
the same numbers after a look at a loader: False
with a generator of its own: True
SEEN
