"What `--log` sends to TensorBoard and to W&B, read back from the files."
import os, subprocess, sys

import numpy as np, pytest
from PIL import Image

import forks

pytestmark = pytest.mark.process


def logged_run(folder, kind, *more, **env):
    "`simclr pretrain` on a few pictures, and the folder of the run."
    images, out = folder/'images', folder/'run'
    images.mkdir()
    for i in range(16):
        noise = np.random.default_rng(i).integers(0, 255, (36, 36, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images/f'{i}.png')
    options = '--arch resnet18_0.125x --size 32 --batch-size 8 --epochs 2 --lr 0.1 --num-workers 0'.split()
    command = [sys.executable, '-m', 'simclr_nb', 'pretrain', images, '--out', out, '--log', kind, *options, *more]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **env}
    done = forks.run(command, capture_output=True, text=True, timeout=240, env=env, stdin=subprocess.DEVNULL)
    return done, out


@pytest.mark.parametrize('kind', ['tensorboard', 'wandb'])
def test_a_run_is_logged(tmp_path, kind):
    done, out = logged_run(tmp_path, kind, WANDB_MODE='offline')
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out/'encoder.safetensors').exists()
    if kind == 'tensorboard':
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(out/'tensorboard'))
        events.Reload()
        assert len(events.Scalars('train_loss')) == 4 and 'contrastive_accuracy' in ' '.join(events.Tags()['scalars'])
    else: assert list((out/'wandb').glob('offline-run-*/run-*.wandb'))


@pytest.mark.parametrize('optimizer', ['adam', 'sgd'])
def test_tensorboard_with_any_optimizer(tmp_path, optimizer):
    "Some settings of theirs are no numbers."
    done, out = logged_run(tmp_path, 'tensorboard', '--optimizer', optimizer)
    assert done.returncode == 0, done.stderr
    assert list((out/'tensorboard').glob('events.*'))


def test_wandb_without_login_is_one_line(tmp_path):
    done, out = logged_run(tmp_path, 'wandb', HOME=str(tmp_path), WANDB_MODE='online', WANDB_API_KEY='')
    assert done.returncode == 1 and not out.exists()
    assert 'needs a login' in done.stderr and 'Traceback' not in done.stderr
    assert 'WANDB_MODE=offline' in done.stderr.splitlines()[-1]
