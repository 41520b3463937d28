"Micro-batches and activation checkpointing: against the whole batch, under mixed precision, with random layers."
import copy

import pytest, timm, torch, torch.distributed as dist, torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_nb.data.sources import augmentations_for, load_images
from simclr_nb.encoder import build_encoder, features_of
from simclr_nb.lars import LARS, learning_rate, param_groups
from simclr_nb.learner import simclr_learner
from simclr_nb.training.memory import Checkpointed, checkpoint_activations
from simclr_nb.ntxent import contrastive_accuracy, contrastive_entropy, nt_xent
from simclr_nb.projection import SimCLR, projection_head

IMAGES, BATCH, EPOCHS = 48, 16, 2
STEPS = EPOCHS*IMAGES//BATCH


class Encoder(nn.Module):
    "Without batch norm; in double precision if told so, whatever comes in."
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.dtype = dtype
        self.net = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.Tanh(), nn.Conv2d(8, 16, 3, 2), nn.GroupNorm(4, 16),
                                 nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(dtype)
    def forward(self, x): return self.net(x.to(self.dtype))


def batches():
    "Two views of some images in each step: patterns of their own, with noise."
    g = torch.Generator().manual_seed(0)
    patterns = torch.rand(IMAGES, 3, 8, 8, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for _ in range(EPOCHS):
        for images in patterns[torch.randperm(IMAGES, generator=g)].split(BATCH):
            yield torch.cat([images + .3*torch.rand(images.shape, generator=g) for _ in range(2)])


class Run:
    "A model after two epochs with LARS; `scale`: under the CPU's autocast, with a scaler that starts there."
    def __init__(self, micro_batch=None, encoder=None, scale=None):
        encoder = encoder or Encoder()
        self.model = SimCLR(encoder, projection_head(features_of(encoder, 32), 'none'), micro_batch)
        self.opt = LARS(param_groups(self.model), lr=3.)
        scaler = torch.amp.GradScaler('cpu', init_scale=scale or 1., enabled=scale is not None)
        self.losses, self.metrics = [], []
        for step, views in enumerate(batches()):
            lr = learning_rate(step, total_steps=STEPS, warmup_steps=2, base=3.)
            for group in self.opt.param_groups: group['lr'] = lr
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=scale is not None): h, z = self.model(views)
            loss = nt_xent(z.float() if scale else z)
            scaler.scale(loss).backward()
            scaler.step(self.opt)
            scaler.update()
            self.opt.zero_grad()
            self.losses.append(loss.detach())
            self.metrics.append([f(z.detach()) for f in (contrastive_accuracy, contrastive_entropy)])

    def weights(self): return self.model.state_dict()


@pytest.mark.parametrize('micro_batch', [1, 3, 5, 16, 99])
def test_lars_steps_are_those_of_the_whole_batch(micro_batch):
    whole, pieces = Run(), Run(micro_batch)
    assert len(whole.losses) == 6
    adapted = [(len(g['params']), g['adapt']) for g in whole.opt.param_groups]
    assert adapted == [(2, True), (4, False)]                   # 2 convolutions; their biases, a norm
    moved = (whole.weights()['encoder.net.0.weight'] - Encoder().net[0].weight).abs().max()
    assert moved > 1e-4, 'nothing was learned'
    for k, v in whole.weights().items(): torch.testing.assert_close(pieces.weights()[k], v, rtol=1e-10, atol=1e-12)
    for a, b in zip(whole.losses, pieces.losses, strict=True): torch.testing.assert_close(a, b)
    torch.testing.assert_close(pieces.metrics, whole.metrics)


def pretrained(micro_batch):
    "A learner after two epochs of `pretrain`."
    cells, solar = load_images('solar_cells').subset(range(IMAGES)), augmentations_for('solar_cells', 32)
    learn = simclr_learner(cells, Encoder(), augment=solar, head='none', num_workers=0, micro_batch=micro_batch)
    plain = learn.loss_func
    learn.loss_func = lambda *args: plain(*args).float()        # fastai's recorder wants single precision
    with learn.no_bar(), learn.no_logging(): learn.pretrain(EPOCHS, batch_size=BATCH, lr=3.)
    return learn


def test_steps_of_a_learner_are_those_of_the_whole_batch():
    whole, pieces = pretrained(None), pretrained(3)
    assert isinstance(whole.opt.opt, LARS) and len(whole.recorder.losses) == 6
    assert (whole.model.encoder.net.net[0].weight - Encoder().net[0].weight).abs().max() > 1e-4, 'nothing was learned'
    a, b = pieces.model.state_dict(), whole.model.state_dict()
    for k, v in b.items(): torch.testing.assert_close(a[k], v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(list(pieces.recorder.losses), list(whole.recorder.losses))
    torch.testing.assert_close(pieces.recorder.values[-1][:3], whole.recorder.values[-1][:3])


def test_h_and_z_are_those_of_the_whole_batch_and_both_have_a_gradient():
    model, views = SimCLR(Encoder(), projection_head(16, bn=False).double()), next(batches())
    def step(micro_batch):
        model.micro_batch = micro_batch
        h, z = model(views)
        loss = nt_xent(z) + nn.functional.cross_entropy(h, torch.arange(len(h)) % 16)
        return h, z, torch.autograd.grad(loss, list(model.parameters()))
    for m in (1, 5, 8): torch.testing.assert_close(step(m), step(None), rtol=1e-12, atol=1e-13)


def test_checkpointed_blocks_with_batch_norm():
    "Whole batch, so the statistics are the same: resnet, head and running statistics agree."
    class Double(nn.Module):
        def forward(self, x): return x.double()
    torch.manual_seed(0)
    plain = nn.Sequential(Double(), build_encoder('resnet18_0.25x', 32).double())
    thin = checkpoint_activations(copy.deepcopy(plain))
    whole, thin = (Run(encoder=encoder).weights() for encoder in (plain, thin))
    assert whole.keys() == thin.keys()
    for k, v in whole.items(): torch.testing.assert_close(thin[k], v, rtol=1e-9, atol=1e-10, msg=k)
    assert any(k.endswith('num_batches_tracked') and v == 6 for k, v in thin.items())


def test_micro_batches_and_checkpointed_blocks_together():
    "The same pieces, so the statistics are the same as without checkpointing."
    torch.manual_seed(0)
    plain = SimCLR(build_encoder('resnet18_0.25x', 32), projection_head(128), micro_batch=6).double()
    thin = copy.deepcopy(plain)
    checkpoint_activations(thin.encoder)
    views = next(batches()).double()
    a, b = (torch.autograd.grad(nt_xent(m(views)[1]), list(m.parameters())) for m in (plain, thin))
    for p, q in zip(a, b, strict=True): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(thin.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert thin.encoder.stem[0].bn.num_batches_tracked == 3


def test_running_statistics_count_each_micro_batch_once():
    model, x = SimCLR(nn.BatchNorm1d(3), nn.Linear(3, 4), micro_batch=4), torch.randn(24, 3)
    by_hand = SimCLR(*copy.deepcopy([model.encoder, model.head]))
    nt_xent(model(x)[1]).backward()
    for i in range(0, 12, 4): by_hand(torch.cat([x[i:i+4], x[12+i:12+i+4]]))
    assert model.encoder.num_batches_tracked == 3 and model.encoder.momentum == .1
    for a, b in zip(model.buffers(), by_hand.buffers()): torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_random_layers_draw_the_same_both_times():
    net = nn.Sequential(nn.Linear(3, 32), nn.Dropout(.5), nn.Linear(32, 4)).double()
    model, x = SimCLR(net, nn.Identity(), micro_batch=4), torch.randn(24, 3).double()
    def grads(z_of):
        torch.manual_seed(1)
        return torch.autograd.grad(nt_xent(z_of(x)), list(net.parameters()))
    def kept(x):
        "The same pieces, with everything kept."
        zs = [net(torch.cat(views)).chunk(2) for views in zip(x[:12].split(4), x[12:].split(4))]
        return torch.cat([torch.cat(half) for half in zip(*zs)])
    for a, b in zip(grads(lambda x: model(x)[1]), grads(kept)): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def flat(weights): return torch.cat([v.flatten() for v in weights.values()])


def test_mixed_precision_and_its_scaler():
    start = Encoder(torch.float32)
    full, whole = Run(encoder=Encoder(torch.float32)), Run(encoder=Encoder(torch.float32), scale=1024.)
    encoder, seen = Encoder(torch.float32), []
    def note(module, inputs, out):
        if module.training: seen.append(out.dtype)              # not when the head's size is found
    encoder.net[0].register_forward_hook(note)
    pieces = Run(4, encoder, scale=1024.)
    assert seen == [torch.bfloat16]*len(seen) and len(seen) == 6*4*2      # steps, pieces, passes: both under autocast
    moved = (flat(full.weights()) - flat(start.state_dict())).norm()
    off, rounding = ((flat(other.weights()) - flat(whole.weights())).norm() for other in (pieces, full))
    # pieces differ from the whole no more than bfloat16 from float32
    assert off < .1*moved and off < 1.5*rounding, (off, rounding, moved)


def test_a_step_that_overflows_is_skipped():
    run = Run(4, Encoder(torch.float32), scale=float('inf'))
    torch.testing.assert_close(flat(run.weights()), flat(Encoder(torch.float32).state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize('what', ['encoder', 'model'])
def test_compiled(what):
    torch.manual_seed(0)
    whole = build_encoder('resnet18_0.25x', 32)
    encoder = nn.Sequential(whole.stem, whole.stage1, whole.mean)                # compiling all stages takes long
    plain = SimCLR(encoder, projection_head(16), micro_batch=6).double()
    net = copy.deepcopy(plain)
    if what == 'model': compiled = torch.compile(net, backend='aot_eager')
    else:
        net.encoder = torch.compile(net.encoder, backend='aot_eager')
        compiled = net
    views = next(batches()).double()
    for _ in range(2):
        a, b = (torch.autograd.grad(nt_xent(m(views)[1]), list(m.parameters())) for m in (plain, compiled))
        for p, q in zip(a, b, strict=True): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    for p, q in zip(plain.buffers(), compiled.buffers(), strict=True): torch.testing.assert_close(p, q)


def test_distributed_data_parallel_and_data_parallel(tmp_path):
    "The wrapped model cuts its own pieces; the other wrapper cuts the rows itself, and is refused where it does."
    model, views = SimCLR(Encoder(), projection_head(16, bn=False).double(), micro_batch=5), next(batches())
    def grads(net):
        model.zero_grad()
        nt_xent(net(views)[1]).backward()
        return [p.grad.clone() for p in model.parameters()]
    want = grads(model)
    dist.init_process_group('gloo', store=dist.FileStore(str(tmp_path/'store'), 1), rank=0, world_size=1)
    try: torch.testing.assert_close(grads(DistributedDataParallel(model)), want, rtol=1e-12, atol=1e-14)
    finally: dist.destroy_process_group()
    if not torch.cuda.is_available(): torch.testing.assert_close(grads(nn.DataParallel(model)), want)
    with pytest.raises(ValueError, match='under DataParallel'): model._replicate_for_data_parallel()(views)


class Rows(nn.Module):
    "A small encoder that notes how many rows it gets, and breaks at one of its calls."
    def __init__(self):
        super().__init__()
        self.bn, self.linear, self.seen, self.breaks_at, self.error = nn.BatchNorm1d(3), nn.Linear(3, 4), [], None, None
    def forward(self, x):
        self.seen.append(len(x))
        x = self.bn(x)
        if len(self.seen) == self.breaks_at: raise self.error
        return self.linear(x)


@pytest.mark.parametrize('error', [KeyboardInterrupt(), FloatingPointError('nan')])
@pytest.mark.parametrize('at', [1, 3, 5, 6])        # in the first pass; in the second, which the backward pass runs
def test_after_a_broken_step_the_model_is_whole(at, error):
    net, x = Rows(), torch.randn(8, 3)
    model = SimCLR(net, nn.Identity(), micro_batch=1)
    opt, before = LARS(param_groups(model), lr=.1), [set(vars(m)) for m in model.modules()]
    def step():
        net.seen.clear()
        nt_xent(model(x)[1]).backward()
        opt.step()
        opt.zero_grad()
        model.eval()
        with torch.no_grad(): model(x[:1])
        model.train()
    net.breaks_at, net.error = at, error
    with pytest.raises(type(error)): step()
    assert len(net.seen) == at
    assert [set(vars(m)) for m in model.modules()] == before
    assert net.bn.momentum == .1 and net.bn.num_batches_tracked == min(at, 4)
    net.breaks_at = model.micro_batch = None
    step()
    assert net.seen == [8, 1], 'a plain step takes the whole batch at once, and then evaluates one row'
    model.micro_batch = 2
    step()
    assert net.seen == [4, 4, 4, 4, 1], 'two pieces, twice; evaluation whole'


def test_a_checkpointed_model_is_left_as_it_was():
    net = checkpoint_activations(given := Rows(), blocks=[given])
    assert isinstance(net, Checkpointed) and type(given) is Rows and 'forward' not in vars(given)
    before, model = set(vars(net)), SimCLR(net, nn.Identity(), micro_batch=2)
    _, z = model(torch.randn(8, 3))                             # and nobody asks for a gradient
    assert set(vars(net)) == before and net.seen == [4, 4] and net.bn.momentum == .1
    nt_xent(z).backward()
    assert set(vars(net)) == before and net.seen[:4] == [4, 4, 4, 4] and net.bn.num_batches_tracked == 2


@pytest.mark.parametrize('micro_batch', [0, -1, 2.5, '8'])
def test_what_is_no_number_of_images_is_refused(micro_batch):
    with pytest.raises(ValueError, match='1 image or more, a whole number'): SimCLR(Rows(), nn.Identity(), micro_batch)


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
    assert [type(m).__name__ for m in thin.modules() if isinstance(m, Checkpointed)] == [f'Checkpointed{kind}']*number
    assert not any('forward' in vars(m) for m in thin.modules())
    x = torch.randn(4, 3, 32, 32).double()
    a, b = (torch.autograd.grad(nt_xent(m(x)), list(m.parameters())) for m in (plain, thin))
    for p, q in zip(a, b, strict=True): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    for p, q in zip(plain.buffers(), thin.buffers(), strict=True): torch.testing.assert_close(p, q, rtol=0, atol=0)
