"A training step asks the device nothing; where there is no GPU, a device that pretends to be one counts the questions."
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import numpy as np, pytest, torch, torch.distributed as dist
from fastai.callback.core import Callback, CancelFitException
from PIL import Image
import forks, pretend
from conftest import free_port
from simclr_nb.augmentations import Augmentation, RandomResizedCrop, RandomTransform, simclr_augmentations
from simclr_nb.training.callbacks import SanityChecksCallback
from simclr_nb.training.history import HistoryCallback
from simclr_nb.training.online import OnlineProbeCallback
from simclr_nb.core import send
from simclr_nb.data.sets import ImageSet
from simclr_nb.distributed import any_rank, gather_rows, host_or
from simclr_nb.learner import simclr_learner
from simclr_nb.evaluation.classifier import supervised_learner
from simclr_nb.ntxent import nt_xent
from simclr_nb.operations import broader_augmentations
from simclr_nb.data.sources import solar_augmentations
from simclr_nb.training.resume import CheckpointsCallback, saved_states
from simclr_nb.core import DelayedValue

pretend.register()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    files = [folder/f'{i}.png' for i in range(32)]
    for file in files: Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(file)
    return ImageSet(files, np.arange(32) % 4, list('abcd'))


def test_elsewhere_nobody_believes_in_the_device():
    assert not torch.get_device_module('pretend').is_available()
    if not torch.cuda.is_available(): assert not torch.accelerator.is_available()
    with pretend.Pretend(): assert torch.get_device_module('pretend').is_available()
    model = torch.nn.DataParallel(torch.nn.Linear(2, 2))    # asks which devices there are
    assert next(model.parameters()).device.type == ('cuda' if torch.cuda.is_available() else 'cpu')


def learner(images, **kwargs):
    learn = simclr_learner(images, **dict(arch='resnet18_0.125x', size=32, num_workers=0) | kwargs)
    learn.set_batch_size(8)
    return learn


def waits(learn, **kwargs):
    "What the last of some steps would wait for."
    with learn.no_logging(): steps = pretend.waits_per_step(learn, **kwargs)
    return steps[-1]


recipes = dict(imagenet=simclr_augmentations(32), broader=broader_augmentations(32, p=.5),
               solar=solar_augmentations(32), torchvision=simclr_augmentations(32, implementation='torchvision'))


@pytest.mark.parametrize('recipe', recipes)
def test_a_step_waits_for_nothing(images, recipe):
    learn = learner(images, augment=recipes[recipe])
    with learn.no_bar(): assert waits(learn) == []


@pytest.mark.parametrize('optimizer', ['lars', 'sgd', 'adam'])
def test_no_optimizer_waits(images, optimizer):
    learn = learner(images, optimizer=optimizer)
    with learn.no_bar(): assert waits(learn) == []


def test_the_progress_bar_waits_for_nothing(images, capsys): assert waits(learner(images)) == []


def test_checkpoints_and_probe_wait_for_nothing(images, tmp_path):
    learn = learner(images)
    learn.add_cbs([CheckpointsCallback(tmp_path, save_every=1000), OnlineProbeCallback()])
    with learn.no_bar(): assert waits(learn) == []


def test_a_line_of_history_is_one_question(images, tmp_path):
    learn = learner(images)
    learn.add_cbs([HistoryCallback(tmp_path/'history.csv')])
    with learn.no_bar(): found = waits(learn)
    assert len(found) == 1 and 'write_means' in found[0][1]


def test_training_with_labels_waits_for_nothing(images):
    learn = supervised_learner(images, 'resnet18_0.125x', 32, batch_size=8, num_workers=0)
    with learn.no_bar(): assert waits(learn) == []


def test_callbacks_can_be_given_to_the_learner(images):
    class Steps(Callback):
        n = 0
        def after_batch(self): self.n += 1
    first, second = Steps(), Asks(lambda loss, h: None)
    learn = learner(images, cbs=[first, second])
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1, 8, lr=.1)
    assert first.n == 4 and learn.asks is second
    learn = supervised_learner(images, 'resnet18_0.125x', 32, batch_size=8, num_workers=0, cbs=Steps())
    assert learn.steps.n == 0


def test_memory_savers_wait_for_nothing(images):
    for kwargs in (dict(micro_batch=4), dict(grad_checkpoint=True)):
        learn = learner(images, **kwargs)
        with learn.no_bar(): assert waits(learn) == [], kwargs


class Asks(Callback):
    "Some ways to ask."
    def __init__(self, how): self.how = how
    def after_loss(self): self.how(self.loss.detach(), self.pred[0].detach())

questions = dict(
    item=lambda loss, h: loss.item(), to_float=lambda loss, h: float(loss), truth=lambda loss, h: bool(loss > 0),
    copy=lambda loss, h: h.cpu(), mask=lambda loss, h: h[h > 0], nonzero=lambda loss, h: h.nonzero(),
    tolist=lambda loss, h: loss.tolist(), select=lambda loss, h: h.masked_select(h > 0),
    blocking_send=lambda loss, h: torch.ones(3).to(h.device))


@pytest.mark.parametrize('how', questions)
def test_a_question_is_counted(images, how):
    learn = learner(images)
    learn.add_cb(Asks(questions[how]))
    with learn.no_bar(): assert len(waits(learn)) == 1


def test_a_transform_that_asks_is_counted(images):
    class Asking(RandomTransform):
        def apply(self, x, params): return x if params.any().item() else x
    learn = learner(images, augment=Augmentation(32, RandomResizedCrop(), Asking(1.)))
    with learn.no_bar(): assert len(waits(learn)) == 1
    learn = learner(images, augment=Augmentation(32, RandomResizedCrop(), Asking(1.)))
    with learn.no_bar(): assert waits(learn, views=False) == []


def test_the_pretended_device_computes(images):
    losses = {}
    for device in ('cpu', 'pretend'):
        learn = learner(images)
        with learn.no_bar(), learn.no_logging():
            if device == 'cpu': learn.fit(1, lr=.01)                 # at .1 rounding grows
            else: pretend.waits_per_step(learn, steps=4, lr=.01)
        losses[device] = [float(pretend.inside(v)) for v in learn.recorder.losses]
    assert len(losses['cpu']) == 4 and losses['pretend'] == pytest.approx(losses['cpu'], rel=1e-5)


# What is not asked at once is asked later

class Spoils(Callback):
    "One gradient that is not a number."
    order = -50
    def __init__(self, step): self.at = step
    def before_step(self):
        if self.learn.step == self.at: next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(np.nan)

def finite(state): return all(v.isfinite().all() for v in state['model'].values() if v.is_floating_point())


def spoiled(images, folder, late, at):
    learn = learner(images)
    learn.remove_cb(SanityChecksCallback)
    learn.add_cbs([SanityChecksCallback(late), Spoils(at), CheckpointsCallback(folder, save_every=1)])
    with learn.no_bar(), learn.no_logging(), pytest.raises(FloatingPointError) as error: learn.pretrain(2, 8, lr=.1)
    return learn, str(error.value)


def test_on_a_cpu_a_bad_gradient_stops_before_the_weights(images, tmp_path):
    learn, said = spoiled(images, tmp_path, None, 2)
    assert 'at step 2 (epoch 0): stopped before it reached the weights' in said
    assert all(p.isfinite().all() for p in learn.model.parameters()) and learn.step == 2


@pytest.mark.parametrize('at', [0, 2, 3, 5, 7])             # 3 and 7 end an epoch, 7 the run
def test_a_late_look_names_the_step_and_no_checkpoint_is_spoiled(images, tmp_path, at):
    learn, said = spoiled(images, tmp_path, True, at)
    assert f'at step {at} (epoch {at//4}): the weights have it by now, and no checkpoint does' in said
    states = [torch.load(f, weights_only=False) for f in saved_states(tmp_path)]
    assert all(finite(s) and s['step'] <= at for s in states) and len(states) >= min(at, 1)


def test_the_loss_looks_at_itself_on_a_cpu_or_when_told():
    bad = torch.tensor([[np.nan, 1.], [1., 0.], [0., 1.], [1., 1.]])
    with pytest.raises(ValueError, match='not finite'): nt_xent(bad)
    assert nt_xent(bad, check=False).isnan()
    with pretend.Pretend() as mode:
        there = bad.to('pretend', non_blocking=True)
        loss = nt_xent(there)
        assert mode.waits == []
        with pytest.raises(ValueError, match='not finite'): nt_xent(there, check=True)
        mode.waits.clear()
        z, tau = torch.rand(8, 4), torch.tensor(.1)
        learned = nt_xent(z.to('pretend', non_blocking=True), temperature=tau.to('pretend', non_blocking=True))
        assert mode.waits == []
    assert loss.inner.isnan() and torch.isclose(learned.inner, nt_xent(z, temperature=tau))


def test_late_reads_what_was_sent():
    with pretend.Pretend() as mode:
        late, x = DelayedValue(), torch.ones(2).to('pretend', non_blocking=True)
        late.put(x.sum())
        got = late.get()
        assert got.device.type == 'cpu' and got == 2 and late.get() is None and mode.waits == []
        assert send(torch.ones(2), 'pretend').device.type == 'pretend' and mode.waits == []


@contextmanager
def group_of_two(config, seen):
    "As if there were a second process that says the same."
    def all_reduce(x, op=None): seen.append(x.device.type)
    with mock.patch('torch.distributed.get_backend_config', lambda group=None: config), \
         mock.patch('simclr_nb.distributed.get_world_size', lambda: 2), \
         mock.patch('torch.distributed.all_reduce', all_reduce): yield


@pytest.mark.parametrize('config, where', [('cpu:gloo,cuda:nccl', 'cpu'), ('cuda:nccl', 'meta'), ('cpu:gloo', 'cpu')])
def test_short_messages_take_the_way_between_cpus(config, where):
    seen = []
    with group_of_two(config, seen):
        assert host_or('meta') == where
        if where == 'cpu': assert any_rank(True, 'meta') and not any_rank(False, 'meta')
    assert seen == ['cpu', 'cpu']*(where == 'cpu')


def one_of_two(rank, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    try:
        with pretend.Pretend() as mode:
            z = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)).to('pretend').requires_grad_()
            mode.waits.clear()
            loss = nt_xent(z, gather=gather_rows)
            loss.backward()
            stops, waits = (any_rank(rank == 1, z.device), any_rank(False, z.device)), list(mode.waits)
            with pytest.raises(ValueError, match='rank 0: 2x8 float32, rank 1: 4x8 float32'):
                gather_rows(z[:2 + 2*rank])
        torch.save(dict(loss=loss.item(), waits=waits, stops=stops), f'{folder}/{rank}.pt')
        dist.barrier()  # nobody leaves while another still sends
    finally: dist.destroy_process_group()


@pytest.mark.process
def test_two_processes_agree_without_waiting_for_their_devices(tmp_path):
    forks.together(one_of_two, 2, (str(tmp_path), free_port()), 120)
    found = [torch.load(tmp_path/f'{rank}.pt') for rank in range(2)]
    rows = [torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    together = torch.cat([r[:2] for r in rows] + [r[2:] for r in rows])
    assert sum(f['loss'] for f in found)/2 == pytest.approx(nt_xent(together).item(), rel=1e-5)
    assert [f['waits'] for f in found] == [[], []] and [f['stops'] for f in found] == [(True, False)]*2


# On a GPU PyTorch counts

@contextmanager
def no_questions():
    torch.cuda.set_sync_debug_mode('error')
    try: yield
    finally: torch.cuda.set_sync_debug_mode('default')


class Quiet(Callback):
    "From the second step on a question is an error."
    order = 1000
    def after_batch(self):
        torch.cuda.set_sync_debug_mode('error')
        if self.iter == 2: raise CancelFitException
    def after_fit(self): torch.cuda.set_sync_debug_mode('default')
    after_failed_fit = after_fit


@needs_gpu
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('recipe', recipes)
def test_on_a_gpu_a_step_waits_for_nothing(images, recipe, precision):
    learn = learner(images, augment=recipes[recipe])
    learn.dls.to(torch.device('cuda', 0))
    if precision == 'bf16': learn.to_bf16()
    learn.add_cb(Quiet())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=.1)
    assert learn.step == 3


@needs_gpu
def test_on_a_gpu_a_question_is_an_error(images):
    learn = learner(images)
    learn.dls.to(torch.device('cuda', 0))
    learn.add_cbs([Quiet(), Asks(questions['item'])])
    with learn.no_bar(), learn.no_logging(), pytest.raises(RuntimeError, match='synchron'): learn.fit(1, lr=.1)


@needs_gpu
def test_on_a_gpu_the_loss_asks_nothing():
    z = torch.randn(64, 16, device='cuda', requires_grad=True)
    nt_xent(z).backward()
    with no_questions(): nt_xent(z, gather=gather_rows).backward()
