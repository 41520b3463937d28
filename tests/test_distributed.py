"Real gloo processes against one process: the loss, its gradient, LARS steps, batch norm, cached gradients, and what is refused."
import copy, datetime, time
from contextlib import contextmanager
from functools import partial

import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_nb.memory import CachedGradients, checkpoint_activations
from simclr_nb.distributed import _batch_norm, gather_rows, global_batch_norm
from simclr_nb.lars import LARS, param_groups
from simclr_nb.ntxent import nt_xent
from simclr_nb.projection import projection_head

SECONDS = 60   # the longest that any collective may wait; a whole group of processes gets twice that
IMAGES = 12    # divisible by 2 and 4


def encoder():
    "A small encoder without batch norm, in double precision, the same wherever it is built."
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 6)).double()
    for p in net.parameters(): p.data = torch.randn(p.shape, generator=g, dtype=p.dtype)
    return net


def batch():
    "(2N, 10): first views, then second views."
    g = torch.Generator().manual_seed(1)
    image = torch.randn(IMAGES, 10, generator=g, dtype=torch.float64)
    return torch.cat([image + .5*torch.randn(image.shape, generator=g, dtype=image.dtype) for _ in range(2)])


def share(x, rank, world):
    "What one process gets of (2N, ...): its images, first views, then second views."
    return torch.cat([v.chunk(world)[rank] for v in x.chunk(2)])


def take_step(net, x, gather=None, chunk=None):
    "Loss, gradients, and the weights after one step of LARS."
    loss = nt_xent(net(x), gather=gather, chunk=chunk)
    loss.backward()
    grads = [p.grad.clone() for p in net.parameters()]
    LARS(net.parameters(), lr=2., weight_decay=1e-2).step()
    return dict(loss=loss.detach(), grads=grads, weights=[p.detach().clone() for p in net.parameters()])


def refusal(*shape, **kwargs):
    "The error that gather_rows raises, and after how many seconds."
    start = time.monotonic()
    try: gather_rows(torch.zeros(shape, **kwargs))
    except ValueError as e: return str(e), time.monotonic() - start


@contextmanager
def counted(numbers):
    "While it is on, every collective adds (its name, the numbers it was given, the numbers it gives)."
    def recorded(name, f, sizes):
        def call(*args, **kwargs):
            numbers.append((name, *sizes(*args)))
            return f(*args, **kwargs)
        return call
    sizes = dict(all_gather_single=lambda out, x: (x.numel(), out.numel()), all_gather_into_tensor=lambda out, x: (x.numel(), out.numel()),
                 reduce_scatter_single=lambda out, x: (x.numel(), out.numel()), reduce_scatter_tensor=lambda out, x: (x.numel(), out.numel()),
                 all_reduce=lambda x: (x.numel(), x.numel()), all_gather=lambda out, x: (x.numel(), sum(o.numel() for o in out)),
                 broadcast=lambda x, *a: (x.numel(), x.numel()))
    before = {k: getattr(dist, k) for k in sizes if hasattr(dist, k)}
    try:
        for k, f in before.items(): setattr(dist, k, recorded(k, f, sizes[k]))
        yield
    finally:
        for k, f in before.items(): setattr(dist, k, f)


@contextmanager
def older_gloo():
    "PyTorch as it was before gloo could reduce_scatter."
    new = {k: getattr(dist, k) for k in ('all_gather_single', 'reduce_scatter_single') if hasattr(dist, k)}
    try:
        for k in new: delattr(dist, k)
        yield
    finally:
        for k, f in new.items(): setattr(dist, k, f)


class Conv(nn.Module):
    "A block, in the sense of `checkpoint_activations`."
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    def forward(self, x): return x + self.bn(self.conv(x)).tanh()


class Activated(nn.BatchNorm2d):
    "A batch norm with its activation, which calls the function itself, as timm's do."
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps).relu()


def with_batch_norm():
    "Encoder and head with batch norm, in double precision; batch norms of both dimensions, with and without a shift."
    torch.manual_seed(0)
    head = projection_head(4, dim_out=6)
    nn.init.normal_(head.layers[0].weight), nn.init.normal_(head.layers[3].weight)
    return nn.Sequential(nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Sequential(Conv(), Conv()),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()


def pictures(): return torch.randn(2*IMAGES, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)*3 + 5


class Loss(nn.Module):
    "What a fastai Learner needs; its recorder wants single precision."
    def forward(self, z, *_): return nt_xent(z, gather=gather_rows).float()


def fit(net, x, *cbs):
    "The weights and buffers of a network after three LARS steps by a fastai Learner."
    learn = Learner(DataLoaders([(x, torch.zeros(len(x)))]*3, []), net, Loss(), opt_func=partial(OptimWrapper, opt=LARS), splitter=param_groups, cbs=list(cbs))
    learn.remove_cbs(ProgressCallback)
    with learn.no_logging(): learn.fit(1, lr=2., wd=1e-2)
    return {k.removeprefix('module.'): v.detach().clone() for k,v in net.state_dict().items()}


def gradients(net, x, gather=None):
    loss = nt_xent(net(x), gather=gather)
    loss.backward()
    return dict(loss=loss.detach(), grads=[p.grad.clone() for p in net.parameters()], buffers=[b.clone() for b in net.buffers()])


def normalised(bn, x, weigh):
    "Output of a batch norm, gradients of a weighted sum of it, and its buffers."
    x = x.clone().requires_grad_()
    y = bn(x)
    (y.to(weigh.dtype)*weigh).sum().backward()
    return dict(y=y.detach(), dx=x.grad, grads=[p.grad for p in bn.parameters()], buffers=[b.clone() for b in bn.buffers()],
                evaluated=torch.zeros(0, dtype=x.dtype) if bn.running_mean is None else bn.eval()(x).detach())


def batch_norms():
    "Kinds of batch norm, and the same rows for everybody: (layer, rows, weights of the sum)."
    g = torch.Generator().manual_seed(3)
    def case(bn, *shape, dtype=torch.float64, like=torch.contiguous_format):
        x = torch.randn(shape, generator=g, dtype=torch.float64)*2 + 7
        for p in bn.parameters(): p.data = 1 + torch.rand(p.shape, generator=g).to(p.dtype)
        return bn, x.to(dtype).contiguous(memory_format=like), torch.randn(shape, generator=g, dtype=torch.float64)
    scale = nn.BatchNorm1d(3); scale.register_parameter('bias', None)
    return dict(rows=case(nn.BatchNorm1d(3).double(), 11, 3), sequences=case(nn.BatchNorm1d(3).double(), 11, 3, 4),
                maps=case(nn.BatchNorm2d(3).double(), 11, 3, 4, 4), scale_only=case(scale.double(), 11, 3),
                channels_last=case(nn.BatchNorm2d(3).double(), 11, 3, 4, 4, like=torch.channels_last),
                bare=case(nn.BatchNorm2d(3, affine=False).double(), 11, 3, 4, 4),
                cumulative=case(nn.BatchNorm1d(3, momentum=None).double(), 11, 3),
                untracked=case(nn.BatchNorm1d(3, track_running_stats=False).double(), 11, 3),
                activated=case(Activated(3).double(), 11, 3, 4, 4),
                single=case(nn.BatchNorm2d(3), 11, 3, 4, 4, dtype=torch.float32),
                half=case(nn.BatchNorm2d(3), 11, 3, 4, 4, dtype=torch.float16), brain=case(nn.BatchNorm1d(3), 11, 3, dtype=torch.bfloat16))


def unequal(x, rank, world):
    "Rows of one process: the last has more than the others, and rank 0 a single one."
    return x.tensor_split([1 + 2*i for i in range(world - 1)])[rank]


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store', world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=SECONDS))
    mine = share(batch(), rank, world)
    seen, first = gather_rows(mine.T.contiguous().T)    # not contiguous: the layout in memory must not matter
    told = dict(seen=seen, first=first, mine=mine)
    told |= take_step(DistributedDataParallel(encoder()), mine, gather_rows)
    told['chunked'] = take_step(DistributedDataParallel(encoder()), mine, gather_rows, chunk=5)
    with older_gloo(): told['older'] = take_step(DistributedDataParallel(encoder()), mine, gather_rows)
    with torch.no_grad(): told['evaluated'] = nt_xent(encoder()(mine), gather=gather_rows)
    told['low'] = nt_xent(encoder()(mine).bfloat16(), gather=gather_rows).detach()
    told['forward'], told['backward'] = [], []
    with counted(told['forward']): loss = nt_xent(encoder()(mine), gather=gather_rows)
    with counted(told['backward']): loss.backward()

    told['cached'] = [fit(DistributedDataParallel(encoder()), mine, CachedGradients(m)) for m in (1, 2)]
    views = share(pictures(), rank, world)
    told['global'] = gradients(DistributedDataParallel(global_batch_norm(with_batch_norm())), views, gather_rows)
    net = global_batch_norm(with_batch_norm())
    told['all'] = fit(DistributedDataParallel(checkpoint_activations(net)), views, CachedGradients(IMAGES//world//3))
    told['bn'] = {k: normalised(global_batch_norm(bn), unequal(x, rank, world), unequal(weigh, rank, world)) for k, (bn, x, weigh) in batch_norms().items()}

    last = rank == world - 1
    told['unequal'] = [refusal(6 if last else 8, 4), refusal(8, 3 if last else 4)]
    told['refused'] = dict(empty=refusal(0 if last else 8, 4), odd=refusal(7 if last else 8, 4), all_odd=refusal(7, 4), flat=refusal(8) if last else refusal(8, 4),
                           scalar=refusal() if last else refusal(8, 4), dtype=refusal(8, 4, dtype=torch.float64 if last else torch.float32),
                           half=refusal(8, 4, dtype=torch.bfloat16 if last else torch.float16), integer=refusal(8, 4, dtype=torch.int64))
    told['after'] = gather_rows(torch.full((2, 1), float(rank)))[0]
    torch.save(told, f'{folder}/rank{rank}.pt')
    dist.barrier()  # nobody leaves while another still sends
    dist.destroy_process_group()


def launch(f, world, folder):
    "Run f(rank, world, folder) in `world` new processes, forked from one that has done the imports; never wait longer than 2*SECONDS."
    mp.get_context('forkserver').set_forkserver_preload(['fastai.learner', 'fastai.callback.progress', 'simclr_nb.distributed', 'simclr_nb.projection'])
    context = mp.start_processes(f, (world, str(folder)), nprocs=world, join=False, start_method='forkserver')
    end = time.monotonic() + 2*SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f'{world} processes were not done after {2*SECONDS} s'
    finally:
        for p in context.processes:
            if p.is_alive(): p.kill()
    return [torch.load(f'{folder}/rank{r}.pt') for r in range(world)]


@pytest.fixture(scope='module', params=[2, 4])
def told(request, tmp_path_factory):
    return launch(worker, request.param, tmp_path_factory.mktemp(f'world{request.param}'))


@pytest.fixture(scope='module')
def one(): return take_step(encoder(), batch())


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rows_lie_in_order_of_rank(told):
    everybody = torch.cat([t['mine'] for t in told])
    for r, t in enumerate(told):
        close(t['seen'], everybody)
        assert t['first'] == r*2*IMAGES//len(told)
        close(t['seen'][t['first']:][:len(t['mine'])], t['mine'])


def test_mean_loss_is_that_of_one_process(told, one):
    close(torch.stack([t['loss'] for t in told]).mean(), one['loss'])
    close(torch.stack([t['evaluated'] for t in told]).mean(), one['loss'])
    assert len({t['loss'].item() for t in told}) == len(told), 'each process has rows of its own'


def test_gradients_are_those_of_one_process(told, one):
    for t in told:
        for a, b in zip(t['grads'], one['grads'], strict=True): close(a, b)


def test_lars_step_gives_the_weights_of_one_process(told, one):
    for t in told:
        for a, b, first in zip(t['weights'], one['weights'], told[0]['weights'], strict=True):
            close(a, b)
            assert torch.equal(a, first), 'weights differ between processes'


def test_half_precision_rows_are_gathered_as_float32(told):
    low = nt_xent(encoder()(batch()).bfloat16()).detach()
    mean = torch.stack([t['low'] for t in told]).mean()
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, low, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('how', ['chunked', 'older'])
def test_blocked_loss_and_older_gloo_give_the_same(told, one, how):
    close(torch.stack([t[how]['loss'] for t in told]).mean(), one['loss'])
    for t in told:
        for a, b in zip(t[how]['grads'] + t[how]['weights'], one['grads'] + one['weights'], strict=True): close(a, b)


def test_n_times_d_numbers_travel_each_way(told):
    world, numbers = len(told), 2*IMAGES*6
    for t in told:
        (_, *shapes), (_, *rows) = t['forward']
        assert shapes == [4, 4*world] and rows == [numbers//world, numbers]
        (name, *back), = t['backward']
        assert name.startswith('reduce_scatter') and back == [numbers, numbers//world]


def test_cached_gradients_take_the_same_lars_steps_as_the_whole_batch_in_one_process(told):
    whole = fit(encoder(), batch())
    assert not torch.allclose(whole['0.weight'], encoder()[0].weight)
    for t in told:
        for cached in t['cached']:
            for k, v in whole.items(): close(cached[k], v)


def test_global_batch_norm_is_that_of_one_process(told):
    one = gradients(with_batch_norm(), pictures())
    close(torch.stack([t['global']['loss'] for t in told]).mean(), one['loss'])
    for t in told:
        for a, b in zip(t['global']['grads'] + t['global']['buffers'], one['grads'] + one['buffers'], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_local_batch_norm_is_not(told):
    "The test above can fail: a process's own share gives another gradient."
    one, alone = gradients(with_batch_norm(), pictures()), gradients(with_batch_norm(), share(pictures(), 0, len(told)))
    assert not torch.allclose(one['buffers'][0], alone['buffers'][0], rtol=1e-3)
    assert (one['loss'] - alone['loss']).abs() > .1


def test_global_batch_norm_cached_gradients_and_checkpointing_together(told):
    "One process with micro-batches of the images that the processes had in each of theirs."
    world = len(told)
    order = torch.stack([torch.stack(r.chunk(3)) for r in torch.arange(IMAGES).chunk(world)], 1).flatten()
    one = fit(with_batch_norm(), torch.cat([v[order] for v in pictures().chunk(2)]), CachedGradients(IMAGES//3))
    whole = fit(with_batch_norm(), pictures())
    assert not torch.allclose(whole['1.weight'], one['1.weight'], rtol=1e-6), 'micro-batches have statistics of their own'
    for t in told:
        for k, v in one.items(): torch.testing.assert_close(t['all'][k], v, rtol=1e-9, atol=1e-11, msg=k)


@pytest.mark.parametrize('kind', batch_norms())
def test_batch_norm_of_unequal_shares(told, kind):
    bn, x, weigh = batch_norms()[kind]
    low = x.dtype.itemsize < 4
    one, rank0 = normalised(copy.deepcopy(bn), x, weigh), told[0]['bn'][kind]
    tol = dict(rtol=1e-10, atol=1e-10) if x.dtype == torch.float64 else dict(rtol=2e-2, atol=2e-2) if low else dict(rtol=1e-4, atol=1e-4)
    for k in ('y', 'dx', 'evaluated'):
        together = torch.cat([t['bn'][kind][k] for t in told])
        assert together.dtype == x.dtype
        torch.testing.assert_close(together, one[k], **tol)
    for i, g in enumerate(one['grads']):
        torch.testing.assert_close(sum(t['bn'][kind]['grads'][i] for t in told), g, **tol)
    for t in told:
        for a, b in zip(t['bn'][kind]['buffers'], one['buffers'], strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, **(dict(rtol=1e-5, atol=1e-5) if low else tol))
    if kind == 'channels_last': assert rank0['y'].is_contiguous(memory_format=torch.channels_last) and rank0['dx'].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('device, backend', [('cpu', 'gloo'), pytest.param('cuda', 'nccl', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'))])
@pytest.mark.parametrize('kind', ['maps', 'scale_only', 'bare', 'channels_last', 'single', 'half', 'brain'])
def test_the_function_alone_on_a_device(tmp_path, device, backend, kind):
    "A group of one process, so that the collectives run on the device."
    bn, x, weigh = batch_norms()[kind]
    x, weigh, bn = x.to(device), weigh.to(device), bn.to(device)
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path/'store'), 1), rank=0, world_size=1)
    try:
        results = []
        for f in (F.batch_norm, _batch_norm):
            v, ps, mean, var = x.clone().requires_grad_(), copy.deepcopy(list(bn.parameters())), bn.running_mean.clone(), bn.running_var.clone()
            weight, bias = (ps + [None, None])[:2]
            y = f(v, mean, var, weight, bias, training=True, momentum=.3)
            results.append([y, *torch.autograd.grad((y.to(weigh.dtype)*weigh).sum(), [v, *ps]), mean, var])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride()
            torch.testing.assert_close(a, b, **(dict(rtol=2e-2, atol=2e-2) if x.dtype.itemsize < 4 else dict(rtol=1e-4, atol=1e-4)))
    finally: dist.destroy_process_group()


def test_unequal_shapes_are_refused_by_all_and_nothing_hangs(told):
    last = len(told) - 1
    for t in told:
        (rows, _), (columns, _) = t['unequal']
        assert 'equally many rows' in rows and 'rank 0: 8x4' in rows and f'rank {last}: 6x4' in rows and 'drop_last=True' in rows
        assert f'rank {last}: 8x3' in columns
        close(t['after'], torch.arange(len(told)).float().repeat_interleave(2)[:, None])   # the group still works


def test_whatever_rows_one_process_has_all_of_them_refuse_at_once(told):
    last = len(told) - 1
    expected = dict(empty=f'rank {last}: 0x4', odd=f'rank {last}: 7x4', all_odd='rank 0: 7x4', flat=f'rank {last}: 1 dimension', scalar=f'rank {last}: 0 dimensions',
                    dtype=f'rank {last}: 8x4 float64', half=f'rank {last}: 8x4 bfloat16', integer='rank 0: 8x4 of another type')
    for t in told:
        assert t['refused'].keys() == expected.keys()
        for k, (message, seconds) in t['refused'].items():
            assert expected[k] in message and '(2n, D)' in message, message
            assert seconds < SECONDS/4, k
