#!/usr/bin/env bash
# Everything that a GPU has to show, in one call of less than nine minutes:
#
#     bench/gpu/run.sh [--out DIR] [--images DIR] [--photos DIR] [--only PART,PART] [--tiny]
#
# --out      where the results go: results.json, results.md, and what each part printed (default: runs/gpu)
# --images   a folder of CIFAR-10 or other small pictures for the part `cifar` (default: pictures made for it)
# --photos   a folder of JPEG photographs for the part `pipeline` (default: its own)
# --only     some of the parts: tests, cells, loss, pipeline, optim, step, cifar
# --tiny     small sizes, for a machine without a GPU: does everything run?
#
# It works from the repository alone, without a network, with the Python in $PYTHON, .venv/bin/python, or python3.
# That Python needs PyTorch, torchvision and NumPy. A part whose packages are missing is left out, and the results say
# so. To take along as wheels what is missing (pip download there, pip install --no-index --no-deps here):
#
#     step, optim, pipeline   fastcore, pillow, safetensors, opencv-python-headless; pipeline also scikit-learn,
#                             scikit-image and simplejpeg
#     cifar, tests            also fastai and what it loads (fastdownload, fastprogress, fasttransform, plum-dispatch,
#                             beartype, cloudpickle, pandas, scipy, requests, pyyaml, packaging), accelerate, timm,
#                             matplotlib, scikit-learn, google-crc32c, tyro (docstring-parser, typeguard,
#                             typing-extensions); tests also pytest
#     cells                   also nbdev and what it needs
#     beside others           lightly (lightly-utils, pytorch-lightning, hydra-core, omegaconf, aenum) for loss, optim
#                             and pipeline; triton and a C compiler for everything compiled
#
# The exit code is 0 where no part failed; a part that is left out has not failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$root/bench/gpu/parts.py" "$@"
