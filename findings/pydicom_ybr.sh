#!/usr/bin/env bash
# pydicom 3.0.2, numpy 2.4.6 (Python 3.11).
# Since version 3, `pixel_array` of a color picture stored as YBR_FULL is RGB already, while the
# data set goes on calling it YBR_FULL. Code that looks there and converts, as version 2 asked for,
# converts twice, without an error.
# Seen: pixel_array [254, 0, 0], called YBR_FULL
#       converted once more [75, 255, 27]
#       raw [76, 85, 255]
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q pydicom==3.0.2 numpy==2.4.6
cd "$dir"
env/bin/python - <<'PY' | tee seen
import numpy as np, pydicom
from pydicom.pixels import convert_color_space, pixel_array
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
red = np.full((4, 4, 3), [255, 0, 0], np.uint8)
ds = pydicom.Dataset()
ds.file_meta = pydicom.dataset.FileMetaDataset()
ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
ds.Rows = ds.Columns = 4
ds.SamplesPerPixel, ds.PlanarConfiguration, ds.PhotometricInterpretation = 3, 0, 'YBR_FULL'
ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
ds.PixelData = convert_color_space(red, 'RGB', 'YBR_FULL').tobytes()
ds.save_as('red.dcm', enforce_file_format=True)
ds = pydicom.dcmread('red.dcm')
x = ds.pixel_array
print(f'pixel_array {x[0, 0].tolist()}, called {ds.PhotometricInterpretation}')
print('converted once more', convert_color_space(x, 'YBR_FULL', 'RGB')[0, 0].tolist())
print('raw', pixel_array(ds, raw=True)[0, 0].tolist())
PY
diff - seen <<'SEEN'
pixel_array [254, 0, 0], called YBR_FULL
converted once more [75, 255, 27]
raw [76, 85, 255]
SEEN
