"What `--log` sends to TensorBoard and to W&B, read back from the files."
import os, subprocess, sys

import numpy as np, pytest
from PIL import Image


@pytest.mark.parametrize('kind', ['tensorboard', 'wandb'])
def test_a_run_is_logged(tmp_path, kind):
    images, out = tmp_path/'images', tmp_path/'run'
    images.mkdir()
    for i in range(16):
        noise = np.random.default_rng(i).integers(0, 255, (36, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images/f'{i}.png')
    options = '--arch resnet18_0.125x --size 32 --batch-size 8 --epochs 2 --lr 0.1 --num-workers 0'.split()
    command = [sys.executable, '-m', 'simclr_nb', 'pretrain', images, '--out', out, '--log', kind, *options]
    env = {**os.environ, 'WANDB_MODE': 'offline', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out/'encoder.safetensors').exists()
    if kind == 'tensorboard':
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(out/'tensorboard'))
        events.Reload()
        assert len(events.Scalars('train_loss')) == 4 and 'contrastive_accuracy' in ' '.join(events.Tags()['scalars'])
    else: assert list((out/'wandb').glob('offline-run-*/run-*.wandb'))
