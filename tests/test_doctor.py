"""What the doctor says: each symptom in a real short run or a real folder, and a healthy one beside it that is silent.

The measures are compared with NumPy and SciPy, written from the formulas of their papers."""
import math, os, subprocess, sys, time, warnings

import numpy as np, pytest, scipy.linalg, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from PIL import Image
from torch import nn

import forks

from simclr_nb.augmentations import Augmentation, RandomFlip, RandomResizedCrop
from simclr_nb.training.callbacks import FreezeEncoderCallback
from simclr_nb.training.history import HistoryCallback, read_history
from simclr_nb.features.copies import image_advice
from simclr_nb.data.sources import augmentations_for
from simclr_nb.data.sets import ImageSet
from simclr_nb.training.checks import plan_advice
from simclr_nb.learner import simclr_learner
from simclr_nb.features.spectrum import alpha_req, lidar, rankme
from simclr_nb.training.online import OnlineMeasuresCallback, view_features
from simclr_nb.training.resume import CheckpointsCallback


# The measures, against their formulas

def features(n, d, seed=0): return np.random.default_rng(seed).normal(size=(n, d))*np.linspace(1, 3, d) + 1

def entropy_rank(values):
    p = values/np.abs(values).sum() + 1e-7
    return np.exp(-np.sum(p*np.log(p)))

@pytest.mark.parametrize('n, d', [(200, 30), (20, 30)])
def test_rankme_is_the_papers(n, d):
    h = features(n, d)
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(h@h.T if n < d else h.T@h), 0))
    assert rankme(torch.tensor(h)) == pytest.approx(entropy_rank(singular), rel=1e-6)

def test_alpha_req_is_a_weighted_line_through_the_spectrum():
    h = features(500, 60)
    variance = np.sort(np.linalg.eigvalsh(np.cov(h.T, bias=True)))[::-1]
    j = np.arange(11, 61)
    line = np.polyfit(np.log(j), np.log(variance[10:]), 1, w=np.sqrt(1/j))          # polyfit squares its weights
    assert alpha_req(torch.tensor(h)) == pytest.approx(-line[0], rel=1e-8)

def lidar_of(h, delta=1e-4):
    n, q, d = h.shape
    between, within, mean = np.zeros((d, d)), delta*np.eye(d), h.reshape(-1, d).mean(0)
    for views in h:
        between += np.outer(views.mean(0) - mean, views.mean(0) - mean)/n
        for view in views: within += np.outer(view - views.mean(0), view - views.mean(0))/(n*q)
    root = scipy.linalg.inv(scipy.linalg.sqrtm(within)).real
    return entropy_rank(np.maximum(np.linalg.eigvalsh(root@between@root), 0))

@pytest.mark.parametrize('n', [40, 9])                    # 9: fewer images than directions
def test_lidar_is_the_papers(n):
    rng = np.random.default_rng(1)
    h = features(n, 16)[:, None] + rng.normal(size=(n, 5, 16))*np.linspace(.1, 2, 16)
    assert lidar(torch.tensor(h)) == pytest.approx(lidar_of(h), rel=1e-5)

@pytest.mark.parametrize('k', [1, 4, 12])
def test_equal_variances_count_directions(k):
    centered, _ = np.linalg.qr(np.c_[np.ones(100), np.random.default_rng(2).normal(size=(100, k))])
    h = np.pad(centered[:, 1:k + 1]*10, ((0, 0), (0, 20 - k)))
    assert rankme(h) == pytest.approx(k, rel=1e-3)
    views = h[:, None] + np.zeros((1, 3, 1))                                    # views that agree entirely
    assert lidar(views) == pytest.approx(k, rel=1e-3)

def test_measures_of_a_collapse():
    assert rankme(np.ones((50, 8))) == pytest.approx(1, abs=1e-3)
    assert lidar(np.ones((50, 4, 8))) == 0 and math.isnan(alpha_req(np.ones((50, 40))))

@pytest.mark.parametrize('scale', [1e-3, 1e3])
def test_measures_do_not_depend_on_the_scale(scale):
    h = features(300, 40)
    assert rankme(h*scale) == pytest.approx(rankme(h), rel=1e-9)
    assert alpha_req(h*scale) == pytest.approx(alpha_req(h), rel=1e-9)
    views = h.reshape(60, 5, 40)
    assert lidar(views*scale, delta=0) == pytest.approx(lidar(views, delta=0), rel=1e-6)


# Runs

class Flat(nn.Module):
    "A small, quick encoder."
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 5, 3), nn.BatchNorm2d(32)
        self.out = nn.Linear(32*9, 32)
    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return F.relu(self.out(F.adaptive_avg_pool2d(x, 3).flatten(1)))

def textures(folder, n, side=20, seed=0):
    "Pictures of random colors that melt into each other; each is another one."
    folder.mkdir(parents=True, exist_ok=True)
    rng, files = np.random.default_rng(seed), []
    for i in range(n):
        grid = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        files.append(folder/f'{i:04}.png')
        grid.resize((side, side), Image.BICUBIC).save(files[-1])
    return ImageSet(files)

@pytest.fixture(scope='module')
def images(tmp_path_factory): return textures(tmp_path_factory.mktemp('set'), 160)

def run(images, epochs=22, batch_size=32, lr=.002, loss=None, warmup=None, change=None, cbs=(), doctor=None, **kwargs):
    "A learner that has trained, and the warnings of its run; that it waits is looked at where a test sets `patience`."
    torch.manual_seed(0)
    how = dict(augment=augmentations_for('cifar10', 16), optimizer='adam', num_workers=0, temperature=.2) | kwargs
    learn = simclr_learner(images, Flat(), **how)
    for name, value in (dict(patience=1e9) | (doctor or {})).items(): setattr(learn.doctor, name, value)
    if loss: learn.loss_func = loss
    if change: change(learn)
    with warnings.catch_warnings(record=True) as seen, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        learn.pretrain(epochs, batch_size, lr, warmup_epochs=warmup, cbs=list(cbs))
    said = [str(w.message) for w in seen if 'doctor' in w.filename or str(w.message) in learn.doctor.said.values()]
    assert said == list(learn.doctor.said.values())
    return learn, said

def agreement(prediction, *batch): return (1 - F.cosine_similarity(*prediction[1].chunk(2))).mean()


def test_a_healthy_run_hears_nothing(images):
    learn, said = run(images, 60, lr=.005, doctor=dict(settled=100, untrained=True))
    losses, accuracies = zip(*[entry[1:3] for entry in learn.doctor.entries])
    assert said == [] and len(losses) == 15
    assert losses[-1] < losses[0] - .3 and accuracies[-1] > 1.5*accuracies[0]        # it is one that learns

def test_collapse(images):
    _, said = run(images, 30, loss=agreement, lr=.02)
    assert 'it is collapsing' in said[0] and 'Does the loss have negatives' in said[0]

def test_accuracy_that_does_not_move(images):
    learn, said = run(images, 40, lr=1e-7, doctor=dict(settled=100))
    assert len(said) == 1 and 'contrastive accuracy was' in said[0] and 'take a higher learning rate' in said[0]
    assert learn.doctor.entries[-1][0] == 200

class Jump(Callback):
    "From some epoch on the learning rate is another one."
    def __init__(self, epoch, lr): self.from_epoch, self.lr = epoch, lr
    def before_step(self):
        if self.epochs_completed() >= self.from_epoch: self.opt.set_hyper('lr', self.lr)

def test_loss_that_rises(images):
    learn, said = run(images, 36, lr=.005, cbs=[Jump(24, 3.)])
    losses = [entry[1] for entry in learn.doctor.entries]
    assert min(losses) == min(losses[:6]) and len(losses) == 9
    assert len(said) == 1 and 'the loss has risen from' in said[0] and 'a longer warm-up' in said[0]

def test_temperature_too_low(images):
    _, said = run(images, 1, temperature=.01)
    assert len(said) == 1 and 'at a temperature of 0.01' in said[0] and 'ln(2N - 1) = 4.1' in said[0]
    assert run(images, 1, temperature=.1)[1] == []

def test_views_that_give_each_other_away(images):
    flat = Augmentation(16, RandomResizedCrop(area=(1, 1), aspect=(1, 1)))
    learn, said = run(images, 1, augment=flat, doctor=dict(untrained=True))
    assert len(said) == 1 and 'with random weights' in said[0] and 'Strengthen the augmentation' in said[0]
    assert run(images, 1, augment=flat, doctor=dict(untrained=False))[1] == []       # weights that know something

def test_who_begins_with_random_weights(images):
    for arch, weights, untrained in (('resnet18_0.125x', None, True), (Flat(), None, False)):
        learn = simclr_learner(images, arch, augment=augmentations_for('cifar10', 16), weights=weights)
        assert learn.doctor.untrained is untrained

def test_images_that_are_all_alike(tmp_path):
    for i in range(40): Image.new('RGB', (20, 20)).save(tmp_path/f'{i}.png')
    _, said = run(ImageSet(sorted(tmp_path.glob('*.png'))), 1)
    assert len(said) == 1 and 'z is the same for all 32 images' in said[0]

class Slowly(Callback):
    "Takes its time in each step, on one side or the other."
    order = 5
    def __init__(self, data): self.data = data
    def before_fit(self):
        dataset, views = self.dls.train.dataset, self.dls.train.dataset.views
        if self.data: dataset.views = lambda *key: (time.sleep(.005), views(*key))[1]
    def before_backward(self):
        if not self.data: time.sleep(.3)

def test_waiting_for_data(images):
    sick, said = run(images, 3, cbs=[Slowly(data=True)], doctor=dict(patience=.5))
    assert len(said) == 1 and 'of the time this run waits for data' in said[0]
    assert '--num-workers; now 0' in said[0] and '--cache' in said[0]
    healthy, silence = run(images, 3, cbs=[Slowly(data=False)], doctor=dict(patience=.5))
    assert silence == [] and healthy.data_wait.total > .5 and healthy.data_wait.share < .3 < .6 < sick.data_wait.share

@pytest.fixture(scope='module')
def many(tmp_path_factory): return textures(tmp_path_factory.mktemp('many'), 1024)

@pytest.mark.parametrize('batch_size, epochs, symptoms', [
    (64, 2, ['few steps']), (32, 1, ['small batch', 'few steps'])])
def test_plans(many, batch_size, epochs, symptoms):
    learn, said = run(many, epochs, batch_size)
    assert list(learn.doctor.said) == symptoms and len(said) == len(symptoms)
    if batch_size == 64: assert 'this run has 32 steps (2 epochs of 1,024 images, 64 a step)' in said[0]
    if batch_size == 64: assert 'take 10 epochs at least' in said[0]

def test_plans_that_will_do():
    "Demo, diagnosis, kept run, the paper's; trials of a few images."
    for images, batch_size, epochs in ((1_968, 256, 24), (5_000, 128, 6), (50_000, 256, 60), (1_281_167, 4096, 100),
                                       (1_024, 64, 10), (24, 8, 1), (999, 32, 1)):
        assert plan_advice(images, batch_size, epochs) == {}

def test_a_loss_that_is_not_finite_is_an_error(images):
    def broken(prediction, *batch): return prediction[1].sum()*math.nan
    with pytest.raises(FloatingPointError, match='the gradient is not finite at step 0'): run(images, 1, loss=broken)

def test_a_loss_of_ones_own_is_not_compared(images):
    assert run(images, 1, loss=lambda prediction, *batch: 100 + prediction[1].square().mean())[1] == []

def test_the_search_for_a_rate_hears_nothing(many):
    learn = simclr_learner(many, Flat(), augment=augmentations_for('cifar10', 16), num_workers=0)
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter('error', UserWarning)
        learn.lr_find(num_it=30, show_plot=False)

def test_frozen_epochs_are_not_compared(images):
    learn, said = run(images, 24, cbs=[FreezeEncoderCallback(12)])
    assert said == [] and learn.doctor.entries[0][0] == 80

class Stop(Callback):
    order = 90
    def __init__(self, after): self.after = after
    def after_epoch(self):
        if self.epochs_completed() == self.after: raise SystemExit

def test_a_run_that_goes_on_is_told_once(tmp_path, many):
    def watched(*more): return [CheckpointsCallback(tmp_path/'c'), *more]
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match='this run has 96 steps'):
        with warnings.catch_warnings(): run(many, 6, 64, cbs=watched(Stop(4)))
    learn, said = run_on(many, watched())
    assert said == [] and list(learn.doctor.said) == ['few steps']
    assert [entry[0] for entry in learn.doctor.entries] == [32, 64, 96]

def run_on(images, cbs):
    learn = simclr_learner(images, Flat(), augment=augmentations_for('cifar10', 16), optimizer='adam', num_workers=0,
        temperature=.2)
    with warnings.catch_warnings(record=True) as seen, learn.no_bar(), learn.no_logging():
        warnings.simplefilter('always')
        learn.pretrain(6, 64, .002, cbs=cbs)
    return learn, [str(w.message) for w in seen if str(w.message) in learn.doctor.said.values()]

def test_the_doctor_changes_nothing(images):
    with_him, _ = run(images, 3, doctor=dict(patience=0))
    without, _ = run(images, 3)
    assert all(map(torch.equal, with_him.model.state_dict().values(), without.model.state_dict().values()))


# The measures in the history

def test_measures_are_written_and_untouched_by_training(images, tmp_path):
    file, watch = tmp_path/'history.csv', OnlineMeasuresCallback(every=2, images=40, views=4)
    learn, _ = run(images, 3, cbs=[HistoryCallback(file), watch])
    plain, _ = run(images, 3)
    assert all(map(torch.equal, learn.model.state_dict().values(), plain.model.state_dict().values()))
    history = read_history(file)
    for name in ('rankme', 'alpha_req', 'lidar'):
        column = history[name][~np.isnan(history[name])]
        assert column == pytest.approx([watch.values[epoch][name] for epoch in (2, 3)], rel=1e-5, nan_ok=True)
    h = view_features(learn.encoder, learn.dls.train.dataset, 40, 4)
    assert h.shape == (40, 4, 32) and lidar(h) == watch.values[3]['lidar']
    learn.encoder.train()                                      # batch norm neither looks nor is touched
    assert torch.equal(view_features(learn.encoder, learn.dls.train.dataset, 40, 4), h) and learn.encoder.training

def test_views_are_grouped_by_image(tmp_path):
    "An encoder that reads the mean color, on pictures of one color each, without a change of color."
    rng = np.random.default_rng(0)
    for i in range(12): Image.new('RGB', (20, 20), tuple(rng.integers(0, 255, 3))).save(tmp_path/f'{i:02}.png')
    augment = Augmentation(16, RandomResizedCrop(), RandomFlip())
    learn = simclr_learner(ImageSet(sorted(tmp_path.glob('*.png'))), Flat(), augment=augment, num_workers=0)
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(1))
        def forward(self, x): return x.mean((2, 3))*self.one
    h = view_features(Mean(), learn.dls.train.dataset, 12, 6)
    assert h.std(1).max() < 1e-3 < h.mean(1).std(0).min()

def test_unreadable_images_are_left_out_of_the_measures(images, tmp_path):
    (tmp_path/'broken.png').write_text('no image')
    some = ImageSet([*images.files[:20], tmp_path/'broken.png'])
    learn = simclr_learner(some, Flat(), augment=augmentations_for('cifar10', 16), num_workers=0)
    assert len(view_features(learn.encoder, learn.dls.train.dataset, 21, 2)) == 20

old_columns = ('step,epoch,loss,contrastive_accuracy,contrastive_entropy,alignment,uniformity,lr,grad_norm,'
               'images_per_second,knn,probe')

def test_a_history_of_before_goes_on(images, tmp_path):
    file = tmp_path/'history.csv'
    cbs = [CheckpointsCallback(tmp_path/'c'), HistoryCallback(file), Stop(3)]
    with pytest.raises(SystemExit): run(images, 6, cbs=cbs)
    whole = file.read_text().splitlines()
    cut = [','.join(line.split(',')[:12]) for line in whole]
    assert cut[0] == old_columns and len(cut) == 16
    file.write_text('\n'.join([*cut[:-1], cut[-1][:40]]) + '\n')                     # the last line broke off
    measures = OnlineMeasuresCallback(every=6, images=20, views=2)
    run(images, 6, cbs=[CheckpointsCallback(tmp_path/'c'), HistoryCallback(file), measures])
    history = read_history(file)
    assert history['step'].tolist() == [*range(1, 15), *range(16, 31), 30]
    assert file.read_text().splitlines()[1:15] == whole[1:15] and np.isfinite(history['rankme'][-1])


# Folders, and the command

def test_copies_and_unreadable_files(tmp_path):
    healthy = textures(tmp_path/'healthy', 60)
    assert image_advice(healthy) == {}
    copies = textures(tmp_path/'copies', 60)
    for i in range(4): healthy[i].save(tmp_path/f'copies/{i:04}-again.bmp')
    sick = ImageSet(sorted((tmp_path/'copies').iterdir()))
    said = image_advice(sick)
    assert list(said) == ['copies'] and '8 of 64 images' in said['copies'] and '0000-again.bmp' in said['copies']
    copies.files[50].write_text('no image')
    assert '1 of 60 files looked at cannot be read' in image_advice(copies)['unreadable']

def pretrain(folder, out, *more):
    options = ('--arch resnet18_0.125x --size 16 --batch-size 16 --epochs 2 --lr 0.1 --num-workers 0 '
               '--measure-every 1').split()
    command = [sys.executable, '-m', 'simclr_nb', 'pretrain', folder, '--out', out, *options, *more]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return forks.run(command, capture_output=True, text=True, timeout=240, env=env, stdin=subprocess.DEVNULL)

@pytest.mark.process
def test_the_command(tmp_path):
    textures(tmp_path/'healthy', 40)
    done = pretrain(tmp_path/'healthy', tmp_path/'run')
    assert done.returncode == 0 and 'warning' not in done.stderr, done.stderr
    assert 'rankme' in done.stdout
    history = read_history(tmp_path/'run'/'history.csv')
    assert np.isfinite(history['rankme']).sum() == np.isfinite(history['lidar']).sum() == 2

@pytest.mark.process
def test_the_command_warns_and_can_be_silent(tmp_path):
    sick = tmp_path/'sick'
    textures(sick, 40)
    for i in range(4): (sick/f'{i:04}-copy.png').write_bytes((sick/f'{i:04}.png').read_bytes())
    done = pretrain(sick, tmp_path/'run', '--temperature', '0.01')
    lines = [line for line in done.stderr.splitlines() if line.startswith('warning: ')]
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert 'nearly the same as another' in lines[0] and 'at a temperature of 0.01' in lines[1]
    done = pretrain(sick, tmp_path/'other', '--temperature', '0.01', '--no-doctor')
    assert done.returncode == 0 and 'warning' not in done.stderr, done.stderr
