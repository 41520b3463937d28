#!/usr/bin/env bash
# timm 1.0.31, torch 2.14.1, torchvision 0.29.1 (Python 3.11).
# `nn.SyncBatchNorm.convert_sync_batchnorm`, the usual step before training on several GPUs
# (fastai's `distrib_ctx` takes it by default), switches activations of many timm networks off:
# timm's batch norm is a subclass that also calls the activation, and PyTorch puts its plain layer
# in its place. The activations stay in the network, are printed with it, and no longer run.
# timm has a function of its own that keeps them.
# Seen: as built: 49 of 49 SiLU layers run
#       converted by PyTorch: 16 of 49 SiLU layers run, features equal False
#       converted by timm: 49 of 49 SiLU layers run, features equal True
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q timm==1.0.31 torch==2.14.1 torchvision==0.29.1
cd "$dir"
env/bin/python -W ignore - <<'PY' | tee seen
import copy, timm, torch
from timm.layers import convert_sync_batchnorm
from torch import nn
torch.manual_seed(0)
net, x = timm.create_model('efficientnet_b0', num_classes=0).eval(), torch.rand(1, 3, 64, 64)
def features(net):
    acts, ran = [m for m in net.modules() if isinstance(m, nn.SiLU)], []
    hooks = [m.register_forward_hook(lambda *args: ran.append(1)) for m in acts]
    with torch.no_grad(): h = net(x)
    for hook in hooks: hook.remove()
    return h, f'{len(ran)} of {len(acts)} SiLU layers run'
h, counted = features(net)
print(f'as built: {counted}')
for name, convert in (('PyTorch', nn.SyncBatchNorm.convert_sync_batchnorm),
                      ('timm', convert_sync_batchnorm)):
    new, counted = features(convert(copy.deepcopy(net)))
    print(f'converted by {name}: {counted}, features equal {torch.allclose(h, new)}')
PY
diff - seen <<'SEEN'
as built: 49 of 49 SiLU layers run
converted by PyTorch: 16 of 49 SiLU layers run, features equal False
converted by timm: 49 of 49 SiLU layers run, features equal True
SEEN
