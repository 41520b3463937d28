#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.4.6 (Python 3.11).
# Saving the same tensors with the same description twice gives two different files: the entries of
# the description ("metadata", strings by name) are written in an order that changes each time.
# With one entry the bytes repeat. So equal weights need not have files with equal hashes.
# Seen: 1 entry, 20 saves, same bytes: True
#       8 entries, 20 saves, same bytes: False
#       8 entries, read back equal: True
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q safetensors==0.8.0 numpy==2.4.6
cd "$dir"
env/bin/python - <<'PY' | tee seen
import json, numpy as np
from safetensors.numpy import save
def saves(notes): return [save({'w': np.zeros(3, np.float32)}, metadata=notes) for _ in range(20)]
def notes_of(b): return json.loads(b[8:8 + int.from_bytes(b[:8], 'little')])['__metadata__']
one, eight = {'a': '1'}, {name: name for name in 'abcdefgh'}
print('1 entry, 20 saves, same bytes:', len(set(saves(one))) == 1)
print('8 entries, 20 saves, same bytes:', len(set(saves(eight))) == 1)
print('8 entries, read back equal:', all(notes_of(b) == eight for b in saves(eight)))
PY
diff - seen <<'SEEN'
1 entry, 20 saves, same bytes: True
8 entries, 20 saves, same bytes: False
8 entries, read back equal: True
SEEN
