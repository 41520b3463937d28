"Loaders whose workers are started afresh, as on macOS, on Windows and with Python 3.14, instead of forked."
import subprocess, sys

import pytest

script = '''
import sys, time
from pathlib import Path
import numpy as np, torch.multiprocessing as mp
from PIL import Image
from simclr_nb.augmentations import simclr_augmentations
from simclr_nb.data import eval_loader, folder_images, train_loader

if __name__ == '__main__':
    mp.set_start_method(sys.argv[2])
    folder = Path(sys.argv[1])
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/f'{i:02}.png')
    (folder/'broken.png').write_text('not a picture')
    images = folder_images(folder)
    loader = train_loader(images, simclr_augmentations(32), batch_size=13, num_workers=1)
    seconds = []
    for epoch in range(4):
        began = time.perf_counter()
        seen = sorted(int(i) for *_, idxs in loader for i in idxs)
        seconds.append(time.perf_counter() - began)
        assert len(seen) == 13 and set(seen) == set(range(12)), seen      # an image takes the place of the broken one
    assert max(seconds[1:]) < seconds[0]/2, f'start-up is paid once: {seconds}'
    assert [f.name for f in loader.dataset.unreadable_files()] == ['broken.png']
    assert sum(len(x) for x, _ in eval_loader(images, 32, batch_size=5, num_workers=1)) == 12
    print('all seen')
'''

@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_loaders_work_when_workers_are_started_afresh(tmp_path, method):
    file = tmp_path/'script.py'
    file.write_text(script)
    (tmp_path/'images').mkdir()
    command = [sys.executable, str(file), str(tmp_path/'images'), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.strip().endswith('all seen'), done.stdout + done.stderr
