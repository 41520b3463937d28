"Callbacks that are left out: a run goes on without them, or says before its first step which one is missing."
import pytest, torch
from torch import nn

from hues import pictures
from simclr_nb.augmentations import Augmentation, RandomFlip, RandomResizedCrop
from simclr_nb.learner import ViewsCallback, simclr_learner
from simclr_nb.training.callbacks import (
    FreezeEncoderCallback, LateLossesCallback, SanityChecksCallback, StepScheduleCallback)
from simclr_nb.training.checks import DataWaitCallback, DoctorCallback
from simclr_nb.training.history import ContrastiveMetricsCallback, HistoryCallback, read_history
from simclr_nb.training.online import OnlineEvalCallback, OnlineMeasuresCallback, OnlineProbeCallback
from simclr_nb.training.resume import CheckpointsCallback

OWN = [SanityChecksCallback, LateLossesCallback, ContrastiveMetricsCallback, DataWaitCallback, DoctorCallback,
       ViewsCallback]
MORE = [CheckpointsCallback, HistoryCallback, OnlineProbeCallback, OnlineEvalCallback, OnlineMeasuresCallback,
        FreezeEncoderCallback]
NEEDED = {SanityChecksCallback: [CheckpointsCallback, HistoryCallback],
          ContrastiveMetricsCallback: [DoctorCallback, HistoryCallback], DataWaitCallback: [DoctorCallback],
          ViewsCallback: []}                                                        # by `pretrain` itself


@pytest.fixture(scope='module')
def images(tmp_path_factory): return pictures(tmp_path_factory.mktemp('images'), 4, 'png')


def made(images, folder, left_out=()):
    "A learner and further callbacks, all of both but those that are left out."
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8))
    learn = simclr_learner(images, encoder, augment=Augmentation(32, RandomResizedCrop(), RandomFlip()), num_workers=0)
    for kind in left_out: learn.remove_cb(kind)
    every = [CheckpointsCallback(folder/'checkpoints'), HistoryCallback(folder/'history.csv'), OnlineProbeCallback(),
             OnlineEvalCallback(lambda encoder: 50., every=1), OnlineMeasuresCallback(1, 8, 2),
             FreezeEncoderCallback(1)]
    return learn, [cb for cb in every if not isinstance(cb, tuple(left_out))]


def trained(images, folder, left_out=()):
    learn, cbs = made(images, folder, left_out)
    before = [p.detach().clone() for p in learn.model.parameters()]
    try:
        with learn.no_bar(), learn.no_logging(): learn.pretrain(2, 6, .1, cbs=cbs)
    except ValueError:
        assert learn.step == 0 and all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))
        raise
    assert learn.step == 4 and not any(torch.equal(a, b) for a, b in zip(before, learn.head.parameters()))
    return learn, cbs


def test_with_all_of_them(images, tmp_path):
    learn, cbs = trained(images, tmp_path)
    assert [type(cb) for cb in cbs] == MORE and all(any(isinstance(cb, kind) for cb in learn.cbs) for kind in OWN)
    history = read_history(tmp_path/'history.csv')
    assert (history['knn'][~torch.isnan(torch.tensor(history['knn']))] == 50).all()
    for column in ('knn', 'probe', 'rankme'): assert (history[column] == history[column]).any(), column


@pytest.mark.parametrize('kind', OWN + MORE)
def test_each_is_left_out(images, tmp_path, kind):
    if kind not in NEEDED:
        trained(images, tmp_path, [kind])
        return
    with pytest.raises(ValueError, match=f'needs a {kind.__name__}, and this learner has none: add one'):
        trained(images, tmp_path, [kind])


@pytest.mark.parametrize('kind', [kind for kind, by in NEEDED.items() if by])
def test_without_those_that_need_it_a_run_goes_on(images, tmp_path, kind):
    learn, _ = trained(images, tmp_path, [kind, *NEEDED[kind]])
    if kind is ContrastiveMetricsCallback: assert learn.recorder.values[-1][1:] == [None, None]     # not a wrong number


@pytest.mark.parametrize('kind, by', [(kind, who) for kind, by in NEEDED.items() for who in by])
def test_each_that_needs_it_says_so(images, tmp_path, kind, by):
    others = [other for other in NEEDED[kind] if other is not by]
    with pytest.raises(ValueError, match=f'{by.__name__} needs a {kind.__name__}, .* or take {by.__name__} out with'):
        trained(images, tmp_path, [kind, *others])


def test_the_schedule_is_not_needed_by_checkpoints_and_doctor(images, tmp_path):
    learn, cbs = made(images, tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=.1, cbs=cbs)
    assert learn.step == 1 and 'total_steps' not in cbs[0].identity
    again, (checkpoints, *_) = trained(images, tmp_path/'scheduled')
    assert checkpoints.identity['total_steps'] == 4 and StepScheduleCallback(4, 1, .1).settings['total_steps'] == 4


def test_looking_at_views_needs_them(images, tmp_path):
    learn, _ = made(images, tmp_path, [ViewsCallback])
    with pytest.raises(ValueError, match='SimCLRLearner needs a ViewsCallback'):
        learn.save_encoder(tmp_path/'e.safetensors')
