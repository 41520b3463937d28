"Loaders whose workers are started afresh, as on macOS and Windows, instead of forked."
import subprocess, sys

script = '''
import sys
from pathlib import Path
import numpy as np, torch.multiprocessing as mp
from PIL import Image
from simclr_nb.augmentations import simclr_augmentations
from simclr_nb.data import folder_images, pair_loaders, eval_loader

if __name__ == '__main__':
    mp.set_start_method('spawn')
    folder = Path(sys.argv[1])
    for i in range(12): Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder/f'{i:02}.png')
    (folder/'broken.png').write_text('not a picture')
    images = folder_images(folder)
    dls = pair_loaders(images, simclr_augmentations(32), bs=13, num_workers=1)
    seen = sorted(int(i) for _, _, idxs in dls.train for i in idxs)
    assert len(seen) == 13 and set(seen) == set(range(12)), seen      # an image takes the place of the broken one
    assert [f.name for f in dls.train.dataset.unreadable_files()] == ['broken.png']
    assert sum(len(x) for x, _ in eval_loader(images, 32, bs=5, num_workers=1)) == 12
    print('all seen')
'''

def test_loaders_work_when_workers_are_spawned(tmp_path):
    file = tmp_path/'spawned.py'
    file.write_text(script)
    (tmp_path/'images').mkdir()
    done = subprocess.run([sys.executable, str(file), str(tmp_path/'images')], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.strip().endswith('all seen'), done.stdout + done.stderr
