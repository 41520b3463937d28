#!/usr/bin/env bash
# Pillow 13.0.0, opencv-python-headless 5.0.0.93, tifffile 2026.3.3, numpy 2.4.6 (Python 3.11).
# In a TIFF whose tag says that 0 is white (scanners, X-rays), Pillow and OpenCV turn the numbers
# around if there are 8 bits, and leave them if there are 16; tifffile never turns them. The same
# picture is a negative or not by its bit depth and its reader.
# Seen, of stored [0, 10, 200]:
#       8 bits: Pillow [255, 245, 55], OpenCV [255, 245, 55], tifffile [0, 10, 200]
#       16 bits: Pillow [0, 10, 200], OpenCV [0, 10, 200], tifffile [0, 10, 200]
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q pillow==13.0.0 opencv-python-headless==5.0.0.93 \
    tifffile==2026.3.3 numpy==2.4.6
cd "$dir"
env/bin/python - <<'PY' | tee seen
import cv2, numpy as np, tifffile
from PIL import Image
stored = [0, 10, 200]
for bits, dtype in ((8, np.uint8), (16, np.uint16)):
    tifffile.imwrite('x.tif', np.array([stored], dtype), photometric='miniswhite')
    pillow, tiff = np.asarray(Image.open('x.tif')), tifffile.imread('x.tif')
    opencv = cv2.imread('x.tif', cv2.IMREAD_UNCHANGED)
    print(f'{bits} bits: Pillow {pillow[0].tolist()}, '
          f'OpenCV {opencv[0].tolist()}, tifffile {tiff[0].tolist()}')
PY
diff - seen <<'SEEN'
8 bits: Pillow [255, 245, 55], OpenCV [255, 245, 55], tifffile [0, 10, 200]
16 bits: Pillow [0, 10, 200], OpenCV [0, 10, 200], tifffile [0, 10, 200]
SEEN
