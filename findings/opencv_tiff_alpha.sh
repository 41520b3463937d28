#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93, tifffile 2026.3.3, numpy 2.4.6 (Python 3.11).
# OpenCV multiplies the colors of an 8-bit RGBA TIFF by its fourth channel, even with
# IMREAD_UNCHANGED; in a 16-bit TIFF, and in a PNG, it leaves them alone. tifffile calls the fourth
# channel of any (H, W, 4) array alpha, so red, green, blue and infrared come back as products.
# Seen: 8-bit TIFF [200, 100, 50, 128] -> [100, 50, 25, 128]
#       16-bit TIFF [200, 100, 50, 128] -> [200, 100, 50, 128]
#       8-bit PNG [200, 100, 50, 128] -> [200, 100, 50, 128]
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q opencv-python-headless==5.0.0.93 tifffile==2026.3.3 \
    numpy==2.4.6
cd "$dir"
env/bin/python - <<'PY' | tee seen
import cv2, numpy as np, tifffile
pixel = [200, 100, 50, 128]
def picture(dtype): return np.full((8, 8, 4), pixel, dtype)
tifffile.imwrite('8.tif', picture(np.uint8))
tifffile.imwrite('16.tif', picture(np.uint16))
cv2.imwrite('8.png', picture(np.uint8)[..., [2, 1, 0, 3]])
for name, file in (('8-bit TIFF', '8.tif'), ('16-bit TIFF', '16.tif'), ('8-bit PNG', '8.png')):
    x = cv2.imread(file, cv2.IMREAD_UNCHANGED)
    print(name, pixel, '->', x[0, 0, [2, 1, 0, 3]].tolist())
PY
diff - seen <<'SEEN'
8-bit TIFF [200, 100, 50, 128] -> [100, 50, 25, 128]
16-bit TIFF [200, 100, 50, 128] -> [200, 100, 50, 128]
8-bit PNG [200, 100, 50, 128] -> [200, 100, 50, 128]
SEEN
