"Cached gradients and activation checkpointing in a real learner: against the whole batch, under mixed precision, with random layers."
import copy

import pytest, timm, torch, torchvision
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn

from simclr_nb.data import augmentations_for
from simclr_nb.data import load_images
from simclr_nb.memory import CachedGradients, _InPieces, checkpoint_activations
from simclr_nb.encoder import build_encoder
from simclr_nb.lars import LARS, param_groups
from simclr_nb.learner import simclr_learner
from simclr_nb.ntxent import nt_xent

CELLS = load_images('solar_cells').subset(range(48))
SOLAR = augmentations_for('solar_cells', 32)


class Encoder(nn.Module):
    "Without batch norm; in double precision if told so, whatever comes in."
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.dtype = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.Tanh(), nn.Conv2d(8, 16, 3, 2), nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(dtype), dtype
    def forward(self, x): return self.net(x.to(self.dtype))


def pretrained(*cbs, encoder=None):
    "A learner after two epochs with LARS, by the rules of `pretrain`."
    learn = simclr_learner(CELLS, encoder or Encoder(), augment=SOLAR, head='none', num_workers=0, splitter=param_groups)
    plain = learn.loss_func
    learn.loss_func = lambda z, *t: plain(z, *t).float()        # fastai's recorder wants single precision
    learn.remove_cbs(ProgressCallback)
    with learn.no_logging(): learn.pretrain(2, bs=16, lr=3., cbs=list(cbs))
    return learn


def weights(learn): return {k: v.detach().clone() for k,v in learn.model.state_dict().items()}


@pytest.mark.parametrize('micro_batch', [1, 3, 5, 16, 99])
def test_lars_steps_of_a_learner_are_those_of_the_whole_batch(micro_batch):
    whole, pieces = pretrained(), pretrained(CachedGradients(micro_batch))
    assert isinstance(whole.opt.opt, LARS) and len(whole.recorder.losses) == 6
    assert [(len(g['params']), g['adapt']) for g in whole.opt.opt.param_groups] == [(2, True), (4, False)]      # 2 convolutions; their biases, a norm
    assert (weights(whole)['encoder.net.0.weight'] - Encoder().net[0].weight).abs().max() > 1e-4, 'nothing was learnt'
    for k, v in weights(whole).items(): torch.testing.assert_close(weights(pieces)[k], v, rtol=1e-10, atol=1e-12)
    for a, b in zip(whole.recorder.losses, pieces.recorder.losses, strict=True): torch.testing.assert_close(a, b)
    torch.testing.assert_close(pieces.recorder.values[-1][:3], whole.recorder.values[-1][:3])
    assert 'forward' not in vars(pieces.model)


def test_checkpointed_blocks_with_batch_norm_in_a_learner():
    "Whole batch, so the statistics are the same: resnet, head and running statistics agree."
    def double():
        torch.manual_seed(0)
        return nn.Sequential(Cast(), build_encoder('resnet18_0.25x', 32).double())
    class Cast(nn.Module):
        def forward(self, x): return x.double()
    whole, thin = (weights(pretrained(encoder=f(double()))) for f in (nn.Identity(), checkpoint_activations))
    assert whole.keys() == thin.keys()
    for k, v in whole.items(): torch.testing.assert_close(thin[k], v, rtol=1e-9, atol=1e-10, msg=k)
    assert any(k.endswith('num_batches_tracked') and v == 6 for k,v in thin.items())


def test_running_statistics_count_each_micro_batch_once():
    bn = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))
    by_hand, x = copy.deepcopy(bn), torch.randn(24, 3)
    bn.forward = _InPieces(bn, 4)
    nt_xent(bn(x)).backward()
    for i in range(0, 12, 4): by_hand(torch.cat([x[i:i+4], x[12+i:12+i+4]]))
    assert bn[0].num_batches_tracked == 3 and bn[0].momentum == .1
    for a, b in zip(bn.buffers(), by_hand.buffers()): torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_random_layers_draw_the_same_both_times():
    net, x = nn.Sequential(nn.Linear(3, 32), nn.Dropout(.5), nn.Linear(32, 4)).double(), torch.randn(24, 3).double()
    def grads(model):
        torch.manual_seed(1)
        return torch.autograd.grad(nt_xent(model(x)), list(net.parameters()))
    def kept(x):
        "The same pieces, with everything kept."
        zs = [net(torch.cat(views)).chunk(2) for views in zip(x[:12].split(4), x[12:].split(4))]
        return torch.cat([torch.cat(half) for half in zip(*zs)])
    for a, b in zip(grads(_InPieces(net, 4)), grads(kept)): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class OnCPU(MixedPrecision):
    "fastai's mixed precision, which knows CUDA only, with the CPU's autocast and a scaler that scales."
    def __init__(self, scale): super().__init__(); self.scale = scale
    def before_fit(self):
        self.autocast, self.scales = torch.autocast('cpu', dtype=torch.bfloat16), []
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=self.scale)


class Watch(Callback):
    "What type the first layer computes in, each time it runs."
    def before_fit(self):
        self.seen = []
        self.hook = next(m for m in self.model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda m, i, o: self.seen.append(o.dtype))
    def after_fit(self): self.hook.remove()


def test_mixed_precision_and_its_scaler():
    full, watch = pretrained(encoder=Encoder(torch.float32)), Watch()
    whole = pretrained(OnCPU(1024.), encoder=Encoder(torch.float32))
    pieces = pretrained(OnCPU(1024.), CachedGradients(4), watch, encoder=Encoder(torch.float32))
    assert watch.seen == [torch.bfloat16]*len(watch.seen) and len(watch.seen) == 6*4*2      # steps, pieces, passes: both under autocast
    moved = torch.cat([(v - w).flatten() for v, w in zip(weights(full).values(), Encoder(torch.float32).state_dict().values())]).norm()
    off, rounding = (torch.cat([(v - w).flatten() for v, w in zip(weights(other).values(), weights(whole).values())]).norm() for other in (pieces, full))
    assert off < .1*moved and off < 1.5*rounding, (off, rounding, moved)           # pieces differ from the whole no more than bfloat16 from float32


def test_a_step_that_overflows_is_skipped():
    learn = pretrained(OnCPU(float('inf')), CachedGradients(4), encoder=Encoder(torch.float32))
    for a, b in zip(weights(learn).values(), Encoder(torch.float32).state_dict().values()): torch.testing.assert_close(a, b, rtol=0, atol=0)


class Rows(nn.Module):
    "A small encoder that notes how many rows it gets, and can break."
    def __init__(self): super().__init__(); self.linear, self.seen, self.broken = nn.Linear(3, 4), [], False
    def forward(self, x):
        self.seen.append(len(x))
        if self.broken: raise KeyboardInterrupt
        return self.linear(x)


class Break(Callback):
    def __init__(self, event, error): setattr(self, event, self.go); self.error = error
    def go(self): raise self.error


@pytest.mark.parametrize('error', [KeyboardInterrupt(), FloatingPointError('nan')])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'after_step', 'inside'])
def test_after_a_broken_fit_the_model_is_whole(event, error):
    net = Rows()
    dls = DataLoaders([(torch.randn(8, 3), torch.zeros(8))], [(torch.randn(1, 3), torch.zeros(1))])
    learn = Learner(dls, net, lambda z, _: nt_xent(z) if len(z) > 1 else z.sum(), opt_func=lambda ps, **kw: OptimWrapper(ps, LARS, **kw), splitter=param_groups)
    learn.remove_cbs(ProgressCallback)
    net.broken = event == 'inside'
    with learn.no_logging():
        with pytest.raises(KeyboardInterrupt if net.broken else type(error)): learn.fit(1, cbs=[CachedGradients(1), Break(event, error)])
        assert 'forward' not in vars(net)
        net.broken = False
        net.seen.clear()
        learn.fit(1, lr=.1)
        assert net.seen == [8, 1], 'a plain fit takes the whole batch at once, and then evaluates one row'
        net.seen.clear()
        learn.fit(1, lr=.1, cbs=CachedGradients(2))
        assert net.seen == [4, 4, 4, 4, 1], 'two pieces, twice; evaluation whole'
    assert 'forward' not in vars(net)


def test_a_cancelled_batch_and_a_checkpointed_model_are_left_as_they_were():
    class Skip(Callback):
        def before_batch(self): raise CancelBatchException
    net = Rows()
    checkpoint_activations(net, blocks=[net])
    before = net.forward
    dls = DataLoaders([(torch.randn(8, 3), torch.zeros(8))], [])
    learn = Learner(dls, net, lambda z, _: nt_xent(z), opt_func=lambda ps, **kw: OptimWrapper(ps, LARS, **kw), splitter=param_groups)
    learn.remove_cbs(ProgressCallback)
    with learn.no_logging():
        learn.fit(1, cbs=[CachedGradients(2), Skip()])
        assert net.forward is before and not net.seen
        learn.fit(1, cbs=CachedGradients(2))
    assert net.forward is before and net.seen[:2] == [4, 4]


@pytest.mark.parametrize('network, kind, number', [
    (lambda: nn.Sequential(torchvision.models.resnet18(num_classes=8), nn.Linear(8, 4)), 'BasicBlock', 8),
    (lambda: timm.create_model('convnext_atto', num_classes=4), 'ConvNeXtBlock', 12),
    (lambda: torchvision.models.mobilenet_v3_small(num_classes=4), 'InvertedResidual', 11)])
def test_the_innermost_blocks_are_taken_and_gradients_are_equal(network, kind, number):
    torch.manual_seed(0)
    plain = network().double()
    for m in plain.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    thin = checkpoint_activations(copy.deepcopy(plain))
    assert [type(m).__name__ for m in thin.modules() if 'forward' in vars(m)] == [kind]*number
    x = torch.randn(4, 3, 32, 32).double()
    a, b = (torch.autograd.grad(nt_xent(m(x)), list(m.parameters())) for m in (plain, thin))
    for p, q in zip(a, b, strict=True): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    for p, q in zip(plain.buffers(), thin.buffers(), strict=True): torch.testing.assert_close(p, q, rtol=0, atol=0)
