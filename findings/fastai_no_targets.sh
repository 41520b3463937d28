#!/usr/bin/env bash
# fastai 2.8.12, torch 2.14.1, torchvision 0.29.1 (Python 3.11).
# A fastai Learner whose loader gives images alone "trains" for as many epochs as it is told,
# with a loss that needs no targets, without an error, and moves no weight: loss and backward pass
# are skipped where a batch has no y. With any second item in the batch it trains.
# Seen: images alone: 8 steps, loss called 0 times, weights moved False
#       images and their numbers: 8 steps, loss called 8 times, weights moved True
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q --no-compile fastai==2.8.12 \
    torch==2.14.1 torchvision==0.29.1
cd "$dir"
env/bin/python -W ignore - <<'PY' | tee seen
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
x = torch.randn(16, 4)
class Steps(Callback):
    n = 0
    def after_batch(self): self.n += self.training
def tried(name, *items):
    calls, net, steps = [], nn.Linear(4, 2), Steps()
    def loss(pred, *y):
        calls.append(len(y))
        return pred.square().mean()
    before = net.weight.detach().clone()
    loader = DataLoader(TensorDataset(*items), 4)
    learn = Learner(DataLoaders(loader, [], device='cpu'), net, loss, lr=.1, cbs=steps)
    learn.remove_cbs(ProgressCallback)
    with learn.no_logging(): learn.fit(2)
    moved = not torch.equal(before, net.weight)
    print(f'{name}: {steps.n} steps, loss called {len(calls)} times, weights moved {moved}')
tried('images alone', x)
tried('images and their numbers', x, torch.arange(16))
PY
diff - seen <<'SEEN'
images alone: 8 steps, loss called 0 times, weights moved False
images and their numbers: 8 steps, loss called 8 times, weights moved True
SEEN
