#!/usr/bin/env bash
# Pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6 (Python 3.11).
# Pillow keeps the 16 bits of a gray picture and drops 8 of them from a color one, without a word;
# and what it keeps, it clips instead of scaling as soon as the picture is converted: everything
# above 255 of 65,535 becomes white. The usual `.convert('RGB')` blanks 16-bit gray pictures.
# Seen: color RGB uint8 [1, 3, 117, 255]
#       gray I;16 uint16 [256, 1000, 30000, 65535]
#       gray, converted to RGB [255, 255, 255, 255]
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$dir"
env/bin/python - <<'PY' | tee seen
import numpy as np, tifffile
from PIL import Image
levels = np.array([[256, 1000, 30_000, 65_535]], np.uint16)
tifffile.imwrite('gray.tif', levels)
tifffile.imwrite('color.tif', np.stack([levels]*3, -1), photometric='rgb')
color, gray = Image.open('color.tif'), Image.open('gray.tif')
x, y = np.asarray(color), np.asarray(gray)
print('color', color.mode, x.dtype, x[0, :, 0].tolist())
print('gray', gray.mode, y.dtype, y[0].tolist())
print('gray, converted to RGB', np.asarray(gray.convert('RGB'))[0, :, 0].tolist())
PY
diff - seen <<'SEEN'
color RGB uint8 [1, 3, 117, 255]
gray I;16 uint16 [256, 1000, 30000, 65535]
gray, converted to RGB [255, 255, 255, 255]
SEEN
