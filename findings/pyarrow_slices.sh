#!/usr/bin/env bash
# pyarrow 26.0.1, numpy 2.4.6 (Python 3.11).
# Pickling a slice of an Arrow array or table pickles the whole of it: one number of a million takes
# 8 MB, where NumPy takes its 8 bytes and a header. Whoever hands rows of a table to the worker
# processes of a DataLoader sends the table with each. Arrow's own stream format cuts first.
# Seen: pickled, 1 of 1,000,000: array True, table True, numpy False hold all of them
#       as a stream: False
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q pyarrow==26.0.1 numpy==2.4.6
cd "$dir"
env/bin/python - <<'PY' | tee seen
import pickle, numpy as np, pyarrow as pa
x = np.arange(1_000_000)
table = pa.table({'x': x})
def whole(*objects): return [len(pickle.dumps(o)) >= x.nbytes for o in objects]
array, rows, numpy = whole(pa.array(x)[:1], table[:1], x[:1])
stream = pa.BufferOutputStream()
with pa.ipc.new_stream(stream, table.schema) as writer: writer.write_table(table[:1])
print(f'pickled, 1 of {len(x):,}: array {array}, table {rows}, numpy {numpy} hold all of them')
print('as a stream:', stream.getvalue().size >= x.nbytes)
PY
diff - seen <<'SEEN'
pickled, 1 of 1,000,000: array True, table True, numpy False hold all of them
as a stream: False
SEEN
