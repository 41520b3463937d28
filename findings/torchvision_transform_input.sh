#!/usr/bin/env bash
# torchvision 0.29.1, torch 2.14.1 (Python 3.11).
# torchvision's googlenet and inception_v3 rescale their input if, and only if, they were built with
# `weights=`. The switch is no part of the state_dict: weights that are saved from such a network
# and loaded into one that was built without fit strictly, and give other features.
# (The weights here are random ones, handed in where torchvision would download.)
# Seen: googlenet: loads strictly True, transform_input True / False, features equal False
#       inception_v3: loads strictly True, transform_input True / False, features equal False
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q --no-compile torchvision==0.29.1 torch==2.14.1
cd "$dir"
env/bin/python -W ignore - <<'PY' | tee seen
import torch
from torchvision.models import GoogLeNet_Weights, Inception_V3_Weights, googlenet, inception_v3
from torchvision.models._api import WeightsEnum
x = torch.rand(1, 3, 96, 96)
for build, weights in ((googlenet, GoogLeNet_Weights), (inception_v3, Inception_V3_Weights)):
    torch.manual_seed(0)
    states = [build(weights=None, init_weights=False).state_dict()]
    WeightsEnum.get_state_dict = lambda self, *args, **kwargs: states[0]
    a = build(weights=weights.DEFAULT).eval()
    b = build(weights=None, init_weights=False, aux_logits=a.aux_logits).eval()
    fits = b.load_state_dict(a.state_dict(), strict=True)
    with torch.no_grad(): same = torch.allclose(a(x), b(x))
    print(f'{build.__name__}: loads strictly {not any(fits)}, '
          f'transform_input {a.transform_input} / {b.transform_input}, features equal {same}')
PY
diff - seen <<'SEEN'
googlenet: loads strictly True, transform_input True / False, features equal False
inception_v3: loads strictly True, transform_input True / False, features equal False
SEEN
