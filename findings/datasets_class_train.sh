#!/usr/bin/env bash
# datasets 5.2.0, Pillow 13.0.0 (Python 3.11).
# A folder of pictures with one folder for each class loses all classes but one if that one is
# called "train", as in COCO, VOC and CIFAR-100: `load_dataset('imagefolder')` takes it for the
# training split, and leaves the others out without a word.
# Seen: bus, car, tram: 6 pictures, classes ['bus', 'car', 'tram']
#       bus, car, train: 2 pictures, no classes
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/python" -m pip install -q datasets==5.2.0 pillow==13.0.0
cd "$dir"
export HF_HOME=$dir/hf HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
env/bin/python -W ignore - <<'PY' | tee seen
from pathlib import Path
from datasets import load_dataset
from PIL import Image
for classes in (['bus', 'car', 'tram'], ['bus', 'car', 'train']):
    root = Path('-'.join(classes))
    for name in classes:
        (root/name).mkdir(parents=True)
        for i in range(2): Image.new('RGB', (8, 8)).save(root/name/f'{i}.png')
    parts = load_dataset('imagefolder', data_dir=str(root))
    found = parts['train'].features.get('label')
    print(f'{", ".join(classes)}: {sum(map(len, parts.values()))} pictures, '
          + (f'classes {found.names}' if found else 'no classes'))
PY
diff - seen <<'SEEN'
bus, car, tram: 6 pictures, classes ['bus', 'car', 'tram']
bus, car, train: 2 pictures, no classes
SEEN
