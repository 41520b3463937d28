"A run of several real processes takes the very steps of a run of one: same batches, views, losses and weights."
import os, tarfile
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from torch import nn

import faults, forks
from conftest import free_port
from simclr_nb.augmentations import simclr_augmentations
from simclr_nb.data.sets import folder_images
from simclr_nb.learner import simclr_learner
from simclr_nb.data.stores import tar_images

pytestmark = pytest.mark.process
IMAGES, BATCH, EPOCHS, STEPS = 40, 32, 10, 13      # a batch does not divide an epoch


class Double(Callback):
    "Trains in double precision; fastai's recorder keeps single."
    order = 1
    def before_fit(self): self.model.double()
    def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)


class Single(nn.Module):
    "A loss in single precision, for fastai's recorder."
    def __init__(self, loss):
        super().__init__()
        self.loss = loss
    def forward(self, *args): return self.loss(*args).float()


class RawLosses(Callback):
    "The loss of every step, over all processes, without smoothing."
    order = 70
    def before_fit(self): self.losses = []
    def after_batch(self):
        loss = self.loss.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        self.losses.append(float(loss))


def train(images, double, lr, size=32, **kwargs):
    "(weights and running statistics, losses, what the recorder says) of a few steps of a small ResNet with LARS."
    augment = simclr_augmentations(size, strength=.5)
    learn = simclr_learner(images, 'resnet18_0.125x', augment=augment, num_workers=0, **kwargs)
    if double: learn.loss_func = Single(learn.loss_func)
    raw = RawLosses()
    cbs = [raw] + [Double()]*double
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx():
        learn.pretrain(EPOCHS, batch_size=BATCH, lr=lr, cbs=cbs)
        assert type(learn.model).__name__ == 'SimCLR' and learn.batch_size == BATCH, 'what was wrapped is unwrapped'
    values = [[float(v) for v in row] for row in learn.recorder.values]
    return dict(weights=learn.model.state_dict(), losses=raw.losses, values=values)


def foreign_loaders(folder):
    "Losses with DataLoaders of fastai's own. All ranks but 0 shuffle by chance: the order of rank 0 counts."
    dls = ImageDataLoaders.from_lists('.', folder_images(folder).files, [0]*IMAGES, bs=16, valid_pct=0., seed=0,
                                      item_tfms=Resize(40, method='squish'), num_workers=0)
    dls.train.shuffle = os.environ.get('RANK', '0') != '0'
    learn = simclr_learner(dls, 'resnet18_0.25x', size=32, temperature=1.)
    raw = RawLosses()
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(): learn.pretrain(1, lr=.003, cbs=raw)
    return raw.losses


def join(rank, world, port):
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='localhost',
                          MASTER_PORT=str(port))


def a_process(rank, world, port, folder):
    join(rank, world, port)
    images = folder_images(folder)
    results = dict(double=train(images, True, .05), single=train(images, False, .003, 64, temperature=1.),
                   foreign=foreign_loaders(folder))
    if world == 2: results['shards'] = train(tar_images(sorted(Path(f'{folder} as shards').iterdir())), True, .05)
    torch.save(results, f'{folder}.{world}.{rank}')


def a_wrong_process(rank, port, folder, fault):
    join(rank, 2, port)
    faults.plant(fault)
    torch.save(train(folder_images(folder), True, .05), f'{folder}.{fault}.{rank}')


def run_all(processes):
    "Run them to their end; none is left behind, even where one waits for ever."
    for p in processes: p.start()
    try:
        for p in processes: p.join(300)
        assert [p.exitcode for p in processes] == [0]*len(processes)
    finally:
        for p in processes: p.kill()


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The results of every process of 1, of 2 and of 4."
    folder = tmp_path_factory.mktemp('run')/'images'
    folder.mkdir()
    for i in range(IMAGES):
        coarse = np.random.default_rng(i).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((60, 50), Image.BICUBIC).save(folder/f'{i:02}.png')
    shards = Path(f'{folder} as shards')
    shards.mkdir()
    for k in range(3):
        with tarfile.open(shards/f'{k}.tar', 'w') as tar:
            for file in sorted(folder.iterdir())[k::3]: tar.add(file, file.name)
    results = {}
    for world in (1, 2, 4):
        port = free_port()
        run_all([forks.Process(target=a_process, args=(rank, world, port, str(folder))) for rank in range(world)])
        results[world] = [torch.load(f'{folder}.{world}.{rank}') for rank in range(world)]
    results['folder'] = str(folder)
    return results


@pytest.mark.parametrize('world', [2, 4])
def test_the_weights_agree_in_double_precision(runs, world):
    one = runs[1][0]['double']
    assert len(one['losses']) == STEPS
    assert one['losses'][0] > one['losses'][-1] + .1, 'it learns: these are not runs that stand still'
    for result in runs[world]:
        weights = result['double']['weights']
        for k, v in one['weights'].items():
            torch.testing.assert_close(weights[k], v, rtol=1e-8, atol=1e-8, msg=lambda m, k=k: f'{k}: {m}')


def test_two_processes_over_shards_take_the_steps_of_one_over_the_folder(runs):
    one = runs[1][0]['double']
    for result in runs[2]:
        torch.testing.assert_close(result['shards']['losses'], one['losses'], rtol=1e-5, atol=0)
        weights = result['shards']['weights']
        for k, v in one['weights'].items(): torch.testing.assert_close(weights[k], v, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('fault', faults.faults)
def test_a_wrong_gradient_is_seen(runs, fault):
    "Each of these bugs trains, and its losses fall; only the comparison with one process tells."
    port, folder = free_port(), runs['folder']
    run_all([forks.Process(target=a_wrong_process, args=(rank, port, folder, fault)) for rank in range(2)])
    wrong, one = torch.load(f'{folder}.{fault}.0'), runs[1][0]['double']
    apart = max((wrong['weights'][k] - v).abs().max() for k, v in one['weights'].items() if v.is_floating_point())
    assert apart > 1e-3, f'after {STEPS} steps the weights differ by {apart:.1e} only'
    losses = np.array([wrong['losses'], one['losses']])
    assert abs(losses[0] - losses[1]).max() > 1e-3, 'so does the loss, which anybody can watch'


@pytest.mark.parametrize('world', [2, 4])
def test_the_losses_agree_in_single_precision(runs, world):
    "With small steps: at the rate of the test above a rounding error grows tenfold every few steps."
    one = runs[1][0]['single']['losses']
    for result in runs[world]: torch.testing.assert_close(result['single']['losses'], one, rtol=1e-5, atol=0)


@pytest.mark.parametrize('world', [2, 4])
def test_what_is_recorded_does_not_depend_on_the_number_of_processes(runs, world):
    for result in runs[world]:
        torch.testing.assert_close(result['double']['values'], runs[1][0]['double']['values'], rtol=1e-5, atol=1e-5)


def test_all_processes_have_the_same_weights_to_the_last_bit(runs):
    for world in (2, 4):
        for kind in ('double', 'single'):
            first, *rest = [result[kind]['weights'] for result in runs[world]]
            for other in rest:
                for k, v in first.items(): assert torch.equal(other[k], v), k


@pytest.mark.parametrize('world', [2, 4])
def test_loaders_of_ones_own_are_shared_too(runs, world):
    for result in runs[world]: torch.testing.assert_close(result['foreign'], runs[1][0]['foreign'], rtol=1e-5, atol=0)
