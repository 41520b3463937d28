#!/usr/bin/env bash
# fastcore 2.2.41, numpy 2.4.6 (Python 3.11).
# `test_close` of fastcore, the assertion of fastai's and nbdev's notebooks, compares as far as the
# shorter list goes, and of dictionaries only the names; `test_eq` of arrays lets shapes broadcast.
# Each of these tests passes.
# Seen: test_close [1, 2] [] passes
#       test_close {'loss': 1.0} {'loss': 5.0} passes
#       test_close shapes (3, 1) (3,) passes
#       test_eq shapes (3,) (1, 3) passes
#       test_close [1, 2] [1, 3] fails
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q fastcore==2.2.41 numpy==2.4.6
cd "$dir"
env/bin/python - <<'PY' | tee seen
import numpy as np
from fastcore.test import test_close, test_eq
def shown(x): return f'{x.shape}' if isinstance(x, np.ndarray) else f'{x}'
def tried(test, a, b):
    try: test(a, b); result = 'passes'
    except AssertionError: result = 'fails'
    kind = 'shapes ' if isinstance(a, np.ndarray) else ''
    print(f'{test.__name__} {kind}{shown(a)} {shown(b)} {result}')
tried(test_close, [1, 2], [])
tried(test_close, {'loss': 1.}, {'loss': 5.})
tried(test_close, np.zeros((3, 1)), np.zeros(3))
tried(test_eq, np.zeros(3), np.zeros((1, 3)))
tried(test_close, [1, 2], [1, 3])
PY
diff - seen <<'SEEN'
test_close [1, 2] [] passes
test_close {'loss': 1.0} {'loss': 5.0} passes
test_close shapes (3, 1) (3,) passes
test_eq shapes (3,) (1, 3) passes
test_close [1, 2] [1, 3] fails
SEEN
