#!/usr/bin/env bash
# nbdev 3.3.26 (Python 3.11).
# nbdev leaves every notebook whose path contains "auto" out of its index of symbols, so that links
# to an autoencoder, autograd or automatic labels are never made in the docs. The code is exported
# all the same, and nothing is said. (It looks for "auto" to skip the cell that it writes itself.)
# Seen: in lib: autoencoder.py encoder.py
#       in the index: lib.encoder.Encoder
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q nbdev==3.3.26
mkdir "$dir/project"; cd "$dir/project"
"$dir/env/bin/python" - <<'PY' | tee ../seen
import json, subprocess, sys
from pathlib import Path
def notebook(n, name):
    cells = [f'#| default_exp {name}', f'#| export\nclass {name.capitalize()}: pass']
    cells = [dict(cell_type='code', id=f'{n}{i}', metadata={}, outputs=[], execution_count=None,
                  source=source) for i, source in enumerate(cells)]
    book = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
    Path(f'nbs/{n:02}_{name}.ipynb').write_text(json.dumps(book))
Path('pyproject.toml').write_text('[project]\nname = "lib"\nversion = "0"\n[tool.nbdev]\n')
Path('nbs').mkdir(); Path('lib').mkdir()
notebook(1, 'encoder'); notebook(2, 'autoencoder')
subprocess.run([Path(sys.executable).with_name('nbdev-export')], check=True)
index = {}
exec(Path('lib/_modidx.py').read_text(), index)
print('in lib:', *sorted(p.name for p in Path('lib').glob('[!_]*.py')))
print('in the index:', *(symbol for part in index['d']['syms'].values() for symbol in part))
PY
diff - ../seen <<'SEEN'
in lib: autoencoder.py encoder.py
in the index: lib.encoder.Encoder
SEEN
