#!/usr/bin/env bash
# datasets 5.2.0, Pillow 13.0.0 (Python 3.11).
# A picture that Pillow opened from a file and that was then changed in place (thumbnail, paste,
# ImageDraw) enters a Hugging Face data set as it was before: of a picture with a file name the set
# keeps the name, and reads the file again. A copy has no file name, and is stored as it is.
# Seen: changed in place: given 64 x 48, stored 640 x 480
#       a copy of it: given 64 x 48, stored 64 x 48
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q datasets==5.2.0 pillow==13.0.0
cd "$dir"
export HF_HOME=$dir/hf HF_HUB_OFFLINE=1
env/bin/python -W ignore - <<'PY' | tee seen
from datasets import Dataset
from PIL import Image
Image.new('RGB', (640, 480), 'red').save('large.png')
small = Image.open('large.png')
small.thumbnail((64, 64))
def size(im): return f'{im.width} x {im.height}'
for name, im in (('changed in place', small), ('a copy of it', small.copy())):
    stored = Dataset.from_dict({'image': [im]})[0]['image']
    print(f'{name}: given {size(im)}, stored {size(stored)}')
PY
diff - seen <<'SEEN'
changed in place: given 64 x 48, stored 640 x 480
a copy of it: given 64 x 48, stored 64 x 48
SEEN
