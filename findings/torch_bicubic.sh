#!/usr/bin/env bash
# torch 2.14.1, Pillow 13.0.0, opencv-python-headless 5.0.0.93, numpy 2.4.6 (Python 3.11).
# `antialias=True` of `F.interpolate` changes bicubic pictures that are enlarged, where there is
# nothing to smooth: with it the kernel has a = -0.5, as in Pillow, without it a = -0.75, as in
# OpenCV. Bilinear pictures do not change. The largest differences, away from the edges, of a
# random picture with values from 0 to 255, enlarged from 16 x 16 to 32 x 32:
# Seen: bilinear, with and without antialias: 0
#       bicubic, with and without antialias: 16
#       bicubic with antialias, and Pillow: 0
#       bicubic without, and OpenCV: 0
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q --no-compile torch==2.14.1 pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 numpy==2.4.6
cd "$dir"
env/bin/python -W ignore - <<'PY' | tee seen
import cv2, numpy as np, torch, torch.nn.functional as F
from PIL import Image
x = np.random.default_rng(0).uniform(0, 255, (16, 16)).astype(np.float32)
def enlarged(mode, antialias):
    y = F.interpolate(torch.tensor(x)[None, None], (32, 32), mode=mode, antialias=antialias)
    return y[0, 0].numpy()
def apart(what, a, b): print(f'{what}: {np.abs(a - b)[8:-8, 8:-8].max():.0f}')
apart('bilinear, with and without antialias', *(enlarged('bilinear', a) for a in (True, False)))
plain, smooth = enlarged('bicubic', False), enlarged('bicubic', True)
apart('bicubic, with and without antialias', plain, smooth)
pillow = np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC))
opencv = cv2.resize(x, (32, 32), interpolation=cv2.INTER_CUBIC)
apart('bicubic with antialias, and Pillow', smooth, pillow)
apart('bicubic without, and OpenCV', plain, opencv)
PY
diff - seen <<'SEEN'
bilinear, with and without antialias: 0
bicubic, with and without antialias: 16
bicubic with antialias, and Pillow: 0
bicubic without, and OpenCV: 0
SEEN
