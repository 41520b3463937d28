"Numbers at the edge, odd arguments, and what the help of a function shows."
import inspect, math, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from fastcore.docments import docments
from PIL import Image

import simclr_nb.all
from simclr_nb.augmentations import simclr_augmentations
from simclr_nb.encoder import load_encoder, save_encoder
from simclr_nb.ntxent import nt_xent
from simclr_nb.lars import LARS
from simclr_nb.data.sets import ImageSet
from simclr_nb.learner import simclr_learner
from simclr_nb.core import save_tensors
from simclr_nb.encoder import build_encoder, resnet
from simclr_nb.training.memory import checkpoint_activations

root = Path(__file__).resolve().parents[1]


def exact(z, tau):
    "NT-Xent in double precision, as the logarithm of 1 + the negatives' share."
    q = F.normalize(z.double(), dim=1)
    s, pos = q @ q.T/tau, torch.arange(len(z)).roll(len(z)//2)[:, None]
    negatives = s.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf).scatter(1, pos, -torch.inf)
    return torch.logaddexp(negatives.logsumexp(1) - s.gather(1, pos)[:, 0], torch.zeros(len(z))).mean()


@pytest.mark.parametrize('n', [2, 4, 16, 100])
@pytest.mark.parametrize('tau', [.1, .05, 1/64, .01])
def test_a_batch_that_is_nearly_solved_keeps_its_digits(n, tau):
    for scale in (0., .05):
        g = torch.Generator().manual_seed(n)
        image = torch.randn(n, 64, generator=g)
        z = torch.cat([image + scale*torch.randn(image.shape, generator=g) for _ in range(2)]).requires_grad_()
        loss, truth = nt_xent(z, temperature=tau), exact(z, tau)
        assert loss.item() >= 0
        torch.testing.assert_close(loss.double(), truth, rtol=3e-5, atol=1e-7)
        (a,), (b,) = torch.autograd.grad(loss, z), torch.autograd.grad(truth, z)
        assert (a - b).norm() <= 1e-4*b.norm()


def test_a_learned_temperature_gets_its_gradient():
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for start in (.2, .01):
        tau = torch.tensor(start, requires_grad=True)
        found, = torch.autograd.grad(nt_xent(z, temperature=tau), tau)
        expected, = torch.autograd.grad(exact(z, tau.double()), tau)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('z, tau, words', [
    (torch.ones(4, 2, dtype=torch.int64), .1, 'real numbers'), (torch.ones(4, 2, dtype=torch.bool), .1, 'real numbers'),
    (torch.ones(4, 0), .1, r'\(4, 0\)'), (torch.eye(4), math.inf, 'above 0 and finite'),
    (torch.eye(4), math.nan, 'above 0 and finite'), (torch.eye(4), 1e-40, 'temperature of 1e-40 overflow')])
def test_what_is_no_batch_or_no_temperature_is_told(z, tau, words):
    with pytest.raises(ValueError, match=words): nt_xent(z, temperature=tau)


def test_compile_and_func_take_the_loss():
    z = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf = z.clone().requires_grad_()
    expected, = torch.autograd.grad(nt_xent(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(nt_xent)(z), expected)
    compiled = torch.compile(nt_xent, fullgraph=True, backend='eager')
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_lars_on_half_precision_weights(dtype):
    "The norm of these weights, 120,000, is beyond float16."
    p = torch.nn.Parameter(torch.full((400, 400), 300., dtype=dtype))
    p.grad = torch.full_like(p, 100)
    LARS([p], lr=1.).step()
    torch.testing.assert_close(p.float(), torch.full((400, 400), 300*.999), rtol=4e-3, atol=0)


@pytest.mark.parametrize('name', ['googlenet', 'inception_v3'])
def test_training_reaches_every_weight(name):
    "DistributedDataParallel stops where one gets no gradient."
    with torch.device('meta'): net = build_encoder(f'torchvision:{name}', 96).train()
    net(torch.rand(2, 3, 96, 96, device='meta')).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize('facts, words', [
    (dict(arch='resnet152_15x'), 'of another shape'), (dict(arch='resnet152_1000x'), '16 at most'),
    (dict(size=10**6), 'size is 1000000'), (dict(feature_dim=10**9), 'has 128 features')])
def test_a_description_is_compared_with_the_tensors_before_anything_is_built(tmp_path, monkeypatch, facts, words):
    net = resnet(18, .25, 'cifar')
    facts = net.config | dict(feature_dim=net.num_features, format=1) | facts
    path = save_tensors(tmp_path/'e', net.state_dict(), simclr_nb=facts)
    kinds, make = set(), torch.nn.Parameter.__new__
    def noted(cls, data=None, *args, **kwargs):
        kinds.add(data.device.type)
        return make(cls, data, *args, **kwargs)
    monkeypatch.setattr(torch.nn.Parameter, '__new__', noted)
    with pytest.raises(ValueError, match=words): load_encoder(path)
    assert kinds <= {'meta'}


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    net = resnet(18, .25, 'cifar')
    with torch.no_grad(): net.stage2[0].branch[0].conv.weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match='not finite: stage2.0.branch.0.conv.weight'):
        load_encoder(save_encoder(net, tmp_path/'e'))


def learner(folder, **kwargs):
    for i in range(16):
        x = np.random.default_rng(i).integers(0, 255, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(x).save(folder/f'{i:02}.png')
    images, augment = ImageSet(sorted(folder.glob('*.png'))), simclr_augmentations(32)
    return simclr_learner(images, 'resnet18_0.25x', augment=augment, num_workers=0, **kwargs)


def test_a_compiled_encoder_with_activation_checkpointing_takes_the_same_steps(tmp_path):
    losses = []
    for compiled in (False, True):
        learn = learner(tmp_path, grad_checkpoint=True)
        if compiled: learn.encoder.compile(backend='aot_eager')
        with learn.no_bar(), learn.no_logging(): learn.pretrain(1, batch_size=8, lr=.1)
        losses.append([float(loss) for loss in learn.recorder.losses])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_activation_checkpointing_is_compiled_to_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    plain, x = checkpoint_activations(build_encoder('resnet18_0.125x', 32)), torch.rand(4, 3, 32, 32)
    compiled = checkpoint_activations(build_encoder('resnet18_0.125x', 32))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(backend='aot_eager', fullgraph=True)
    grads = [torch.autograd.grad(e(x).square().sum(), list(e.parameters())) for e in (plain, compiled)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(plain.buffers(), compiled.buffers()): torch.testing.assert_close(a, b)     # each batch counts once
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@pytest.mark.parametrize('kwargs', [{}, dict(grad_checkpoint=True), dict(micro_batch=4)])
def test_channels_stay_last_through_a_step(tmp_path, kwargs):
    learn, seen = learner(tmp_path, **kwargs), []
    for m in learn.encoder.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.BatchNorm2d)):
            m.register_forward_hook(lambda m, args, out: seen.extend([args[0], out]))
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1, batch_size=8, lr=.1)
    large = [x for x in seen if x.shape[1] > 1 and x.shape[2] > 1]           # else both orders are the same
    assert len(large) > 20 and all(x.is_contiguous(memory_format=torch.channels_last) for x in large)
    weights = [p for p in learn.encoder.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert all(p.grad is None or p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_fewer_images_than_a_batch_are_one_batch(tmp_path):
    learn = learner(tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.pretrain(1)
    assert learn.batch_size == 16 and learn.step == 1


def test_a_failed_fit_leaves_autocast_off(tmp_path):
    learn = learner(tmp_path).to_bf16()
    def fails(*args): raise RuntimeError('not today')
    learn.loss_func = fails
    try:
        with learn.no_bar(), pytest.raises(RuntimeError, match='not today'): learn.fit(1)
        assert not torch.is_autocast_enabled('cpu')
    finally: torch.set_autocast_enabled('cpu', False)


@pytest.mark.parametrize('kwargs, words', [(dict(temperature=math.inf), 'above 0 and finite'),
                                           (dict(projection_dim=10**9), '2\\*\\*31 are the most')])
def test_settings_that_cannot_be_are_told_at_once(tmp_path, kwargs, words):
    with pytest.raises(ValueError, match=words): learner(tmp_path, **kwargs)


# The help

plain_names = {'a', 'train', 'test', 'images', 'seed', 'num_workers', 'batch_size', 'size', 'samples', 'title',
               'fraction', 'protocols'}        # they mean the same everywhere, or share the comment of the next one

def public(): return {name: f for name in simclr_nb.all.__all__ if callable(f := getattr(simclr_nb.all, name))}

def undocumented(f):
    "Parameters without a comment; and the comment of **kwargs, where it is taken for that of the answer."
    found, params = docments(f, returns=True), inspect.signature(f).parameters
    wrong = [k for k, p in params.items() if found.get(k) is None and k not in plain_names
             and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    source = inspect.getsource(f).splitlines()
    of_kwargs = {line.partition('#')[2].strip() for line in source if line.strip().startswith('**') and '#' in line}
    return wrong + [found['return']]*(found.get('return') in of_kwargs)

@pytest.mark.parametrize('name', public())
def test_every_parameter_has_its_comment(name): assert not undocumented(public()[name])

def test_a_missing_comment_is_seen():
    def f(x, # documented
          y,
          **more, # to g
    )->int:
        pass
    assert undocumented(f) == ['y', 'to g']


@pytest.mark.process
def test_imports_are_silent():
    code = 'import simclr_nb.all, timm, warnings; warnings.warn("IProgress not found. Please update jupyter")'
    done = subprocess.run([sys.executable, '-W', 'default', '-c', code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stderr == done.stdout == ''
