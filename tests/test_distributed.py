"Real gloo processes against one process: loss, gradient, metrics, LARS steps, batch norm, micro-batches, and errors."
import copy, datetime, os, time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import forks
from conftest import free_port
from simclr_nb.training.online import OnlineEvalCallback
from simclr_nb.distributed import _batch_norm, any_rank, gather_rows, global_batch_norm, process_group
from simclr_nb.lars import LARS, param_groups
from simclr_nb.training.memory import checkpoint_activations
from simclr_nb.ntxent import NTXentLoss, contrastive_metrics, nt_xent
from simclr_nb.projection import SimCLR, projection_head

pytestmark = pytest.mark.process
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


def refused_views(n, m):
    "The error of the loss for n first and m second views, and after how many seconds."
    start = time.monotonic()
    try: nt_xent(torch.zeros(n, 4), torch.zeros(m, 4), gather=gather_rows)
    except ValueError as e: return str(e), time.monotonic() - start


@contextmanager
def counted(numbers):
    "While it is on, every collective adds (its name, the numbers it was given, the numbers it gives)."
    def recorded(name, f, sizes):
        def call(*args, **kwargs):
            numbers.append((name, *sizes(*args)))
            return f(*args, **kwargs)
        return call
    def in_out(out, x): return x.numel(), out.numel()
    def in_outs(outs, x): return x.numel(), sum(o.numel() for o in outs)
    def in_place(x, *args): return x.numel(), x.numel()
    sizes = dict(all_gather_single=in_out, all_gather_into_tensor=in_out, all_gather=in_outs,
                 reduce_scatter_single=in_out, reduce_scatter_tensor=in_out, all_reduce=in_place, broadcast=in_place)
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
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                         self.training, self.momentum, self.eps)
        return y.relu()


def with_batch_norm():
    "Encoder and head with batch norm, in double precision; batch norms of both dimensions, with and without a shift."
    torch.manual_seed(0)
    head = projection_head(4, dim_out=6)
    nn.init.normal_(head.layers[0].weight), nn.init.normal_(head.layers[3].weight)
    return nn.Sequential(nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4),
                         nn.Sequential(Conv(), Conv()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).double()


def pictures(): return torch.randn(2*IMAGES, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)*3 + 5


def fit(net, x, micro_batch=None):
    "The weights and buffers of encoder and head after three LARS steps."
    simclr = SimCLR(net[:-1], net[-1], micro_batch)
    model = DistributedDataParallel(simclr) if dist.is_initialized() else simclr
    opt = LARS(param_groups(simclr), lr=2., weight_decay=1e-2)
    for _ in range(3):
        opt.zero_grad()
        h, z = model(x)
        nt_xent(z, gather=gather_rows).backward()
        opt.step()
    return {k: v.detach().clone() for k,v in simclr.state_dict().items()}


def gradients(net, x, gather=None):
    loss = nt_xent(net(x), gather=gather)
    loss.backward()
    return dict(loss=loss.detach(), grads=[p.grad.clone() for p in net.parameters()],
                buffers=[b.clone() for b in net.buffers()])


def normalized(bn, x, weigh):
    "Output of a batch norm, gradients of a weighted sum of it, and its buffers."
    x = x.clone().requires_grad_()
    y = bn(x)
    (y.to(weigh.dtype)*weigh).sum().backward()
    grads, buffers = [p.grad for p in bn.parameters()], [b.clone() for b in bn.buffers()]
    evaluated = torch.zeros(0, dtype=x.dtype)
    if bn.running_mean is not None: evaluated = bn.eval()(x).detach()
    return dict(y=y.detach(), dx=x.grad, grads=grads, buffers=buffers, evaluated=evaluated)


def batch_norms():
    "Kinds of batch norm, and the same rows in every process: (layer, rows, weights of the sum)."
    g = torch.Generator().manual_seed(3)
    def case(bn, *shape, dtype=torch.float64, like=torch.contiguous_format):
        x = torch.randn(shape, generator=g, dtype=torch.float64)*2 + 7
        for p in bn.parameters(): p.data = 1 + torch.rand(p.shape, generator=g).to(p.dtype)
        return bn, x.to(dtype).contiguous(memory_format=like), torch.randn(shape, generator=g, dtype=torch.float64)
    scale = nn.BatchNorm1d(3)
    scale.register_parameter('bias', None)
    return dict(rows=case(nn.BatchNorm1d(3).double(), 11, 3), sequences=case(nn.BatchNorm1d(3).double(), 11, 3, 4),
                maps=case(nn.BatchNorm2d(3).double(), 11, 3, 4, 4), scale_only=case(scale.double(), 11, 3),
                channels_last=case(nn.BatchNorm2d(3).double(), 11, 3, 4, 4, like=torch.channels_last),
                bare=case(nn.BatchNorm2d(3, affine=False).double(), 11, 3, 4, 4),
                cumulative=case(nn.BatchNorm1d(3, momentum=None).double(), 11, 3),
                untracked=case(nn.BatchNorm1d(3, track_running_stats=False).double(), 11, 3),
                activated=case(Activated(3).double(), 11, 3, 4, 4),
                single=case(nn.BatchNorm2d(3), 11, 3, 4, 4, dtype=torch.float32),
                half=case(nn.BatchNorm2d(3), 11, 3, 4, 4, dtype=torch.float16),
                brain=case(nn.BatchNorm1d(3), 11, 3, dtype=torch.bfloat16))


def unequal(x, rank, world):
    "Rows of one process: the last has more than the others, and rank 0 a single one."
    return x.tensor_split([1 + 2*i for i in range(world - 1)])[rank]


def idle_first(x, rank, world):
    "Rows of one process: rank 0 has none."
    return x[:0] if rank == 0 else x.chunk(world - 1)[rank - 1]


def too_few(rows):
    "The error of a batch norm that gets so many rows in this process."
    try: global_batch_norm(nn.BatchNorm1d(3))(torch.ones(rows, 3))
    except ValueError as e: return str(e)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store', world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=SECONDS))
    mine = share(batch(), rank, world)
    seen, first = gather_rows(mine.T.contiguous().T)    # not contiguous: the layout in memory must not matter
    out = dict(seen=seen, first=first, mine=mine)
    out |= take_step(DistributedDataParallel(encoder()), mine, gather_rows)
    out['chunked'] = take_step(DistributedDataParallel(encoder()), mine, gather_rows, chunk=5)
    with older_gloo(): out['older'] = take_step(DistributedDataParallel(encoder()), mine, gather_rows)
    with torch.no_grad():
        z = encoder()(mine)
        out['two views'] = NTXentLoss(gather=gather_rows)(*z.chunk(2)), nt_xent(z, gather=gather_rows)
    with torch.no_grad(): out['evaluated'] = nt_xent(encoder()(mine), gather=gather_rows)
    out['low'] = nt_xent(encoder()(mine).bfloat16(), gather=gather_rows).detach()
    out['forward'], out['backward'] = [], []
    with counted(out['forward']): loss = nt_xent(encoder()(mine), gather=gather_rows)
    with counted(out['backward']): loss.backward()

    out['metrics'] = contrastive_metrics(encoder()(mine), gather=gather_rows)
    out['alone'] = contrastive_metrics(encoder()(mine))

    out['micro'] = [fit(encoder(), mine, micro_batch) for micro_batch in (1, 2)]
    views = share(pictures(), rank, world)
    out['global'] = gradients(DistributedDataParallel(global_batch_norm(with_batch_norm())), views, gather_rows)
    net = global_batch_norm(with_batch_norm())
    out['all'] = fit(checkpoint_activations(net), views, IMAGES//world//3)
    out['bn'] = {k: normalized(global_batch_norm(bn), unequal(x, rank, world), unequal(weigh, rank, world))
                  for k, (bn, x, weigh) in batch_norms().items()}
    out['idle'] = {k: normalized(global_batch_norm(bn), idle_first(x, rank, world), idle_first(weigh, rank, world))
                   for k, (bn, x, weigh) in batch_norms().items()}
    out['too few'] = too_few(0), too_few(int(rank == 1))

    last = rank == world - 1
    out['unequal'] = [refusal(6 if last else 8, 4), refusal(8, 3 if last else 4)]
    out['refused'] = dict(
        empty=refusal(0 if last else 8, 4), odd=refusal(7 if last else 8, 4), all_odd=refusal(7, 4),
        flat=refusal(8) if last else refusal(8, 4), scalar=refusal() if last else refusal(8, 4),
        dtype=refusal(8, 4, dtype=torch.float64 if last else torch.float32),
        half=refusal(8, 4, dtype=torch.bfloat16 if last else torch.float16), integer=refusal(8, 4, dtype=torch.int64),
        narrow=refusal(8, 0))
    out['refused views'] = refused_views(4, 3 if last else 4)
    out['after'] = gather_rows(torch.full((2, 1), float(rank)))[0]
    torch.save(out, f'{folder}/rank{rank}.pt')
    dist.barrier()  # nobody leaves while another still sends
    dist.destroy_process_group()


def launch(f, world, folder):
    "Run f(rank, world, folder) in `world` processes; at most 2*SECONDS."
    forks.together(f, world, (world, str(folder)), 2*SECONDS)
    return [torch.load(f'{folder}/rank{r}.pt') for r in range(world)]


def slow_host(rank, world, folder):
    "Join a group and leave it three times, as a notebook does that trains thrice; process 0 is slow to leave."
    port = int(open(f'{folder}/port').read())
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='localhost', MASTER_PORT=str(port))
    destroy, sums = dist.destroy_process_group, []
    def late():
        time.sleep(1)
        destroy()
    if rank == 0: dist.destroy_process_group = late
    for i in range(3):
        with process_group():
            x = torch.tensor([float(rank + i)])
            dist.all_reduce(x)
            sums.append(x.item())
    torch.save(sums, f'{folder}/rank{rank}.pt')


def test_a_second_group_does_not_wait_in_the_first(tmp_path):
    (tmp_path/'port').write_text(str(free_port()))
    assert launch(slow_host, 2, tmp_path) == [[1., 3., 5.]]*2


@pytest.fixture(scope='module', params=[2, 4])
def ranks(request, tmp_path_factory):
    return launch(worker, request.param, tmp_path_factory.mktemp(f'world{request.param}'))


@pytest.fixture(scope='module')
def one(): return take_step(encoder(), batch())


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rows_lie_in_order_of_rank(ranks):
    everyone = torch.cat([t['mine'] for t in ranks])
    for r, t in enumerate(ranks):
        close(t['seen'], everyone)
        assert t['first'] == r*2*IMAGES//len(ranks)
        close(t['seen'][t['first']:][:len(t['mine'])], t['mine'])


def test_mean_loss_is_that_of_one_process(ranks, one):
    close(torch.stack([t['loss'] for t in ranks]).mean(), one['loss'])
    close(torch.stack([t['evaluated'] for t in ranks]).mean(), one['loss'])
    assert len({t['loss'].item() for t in ranks}) == len(ranks), 'each process has rows of its own'


def test_gradients_are_those_of_one_process(ranks, one):
    for t in ranks:
        for a, b in zip(t['grads'], one['grads'], strict=True): close(a, b)


def test_lars_step_gives_the_weights_of_one_process(ranks, one):
    for t in ranks:
        for a, b, first in zip(t['weights'], one['weights'], ranks[0]['weights'], strict=True):
            close(a, b)
            assert torch.equal(a, first), 'weights differ between processes'


def test_half_precision_rows_are_gathered_as_float32(ranks):
    low = nt_xent(encoder()(batch()).bfloat16()).detach()
    mean = torch.stack([t['low'] for t in ranks]).mean()
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, low, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('how', ['chunked', 'older'])
def test_blocked_loss_and_older_gloo_give_the_same(ranks, one, how):
    close(torch.stack([t[how]['loss'] for t in ranks]).mean(), one['loss'])
    for t in ranks:
        for a, b in zip(t[how]['grads'] + t[how]['weights'], one['grads'] + one['weights'], strict=True): close(a, b)


def test_n_times_d_numbers_travel_each_way(ranks):
    world, numbers = len(ranks), 2*IMAGES*6
    for t in ranks:
        (_, *shapes), (_, *rows) = t['forward']
        assert shapes == [4, 4*world] and rows == [numbers//world, numbers]
        (name, *back), = t['backward']
        assert name.startswith('reduce_scatter') and back == [numbers, numbers//world]


def test_mean_metrics_are_those_of_the_whole_batch(ranks):
    accuracy, entropy = contrastive_metrics(encoder()(batch()))
    accuracies, entropies = (torch.stack(metric) for metric in zip(*(t['metrics'] for t in ranks)))
    assert 0 < accuracy < 1 and entropies.dtype == torch.float64
    torch.testing.assert_close(accuracies.mean(), accuracy, rtol=1e-6, atol=0)
    close(entropies.mean(), entropy)
    alone = torch.stack([t['alone'][1] for t in ranks]).mean()
    assert alone < entropy - .01, 'with second views of one process only, there are fewer candidates'


def test_micro_batches_take_the_same_lars_steps_as_the_whole_batch_in_one_process(ranks):
    whole = fit(encoder(), batch())
    assert not torch.allclose(whole['encoder.0.weight'], encoder()[0].weight)
    for t in ranks:
        for micro in t['micro']:
            for k, v in whole.items(): close(micro[k], v)


def test_global_batch_norm_is_that_of_one_process(ranks):
    one = gradients(with_batch_norm(), pictures())
    close(torch.stack([t['global']['loss'] for t in ranks]).mean(), one['loss'])
    for t in ranks:
        for a, b in zip(t['global']['grads'] + t['global']['buffers'], one['grads'] + one['buffers'], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_local_batch_norm_is_not(ranks):
    "The test above can fail: a process's own share gives another gradient."
    one = gradients(with_batch_norm(), pictures())
    alone = gradients(with_batch_norm(), share(pictures(), 0, len(ranks)))
    assert not torch.allclose(one['buffers'][0], alone['buffers'][0], rtol=1e-3)
    assert (one['loss'] - alone['loss']).abs() > .1


def test_global_batch_norm_micro_batches_and_checkpointing_together(ranks):
    "One process with micro-batches of the images that the processes had in each of theirs."
    world = len(ranks)
    order = torch.stack([torch.stack(r.chunk(3)) for r in torch.arange(IMAGES).chunk(world)], 1).flatten()
    one = fit(with_batch_norm(), torch.cat([v[order] for v in pictures().chunk(2)]), IMAGES//3)
    whole = fit(with_batch_norm(), pictures())
    name = 'encoder.1.weight'
    assert not torch.allclose(whole[name], one[name], rtol=1e-6), 'micro-batches have statistics of their own'
    for t in ranks:
        for k, v in one.items(): torch.testing.assert_close(t['all'][k], v, rtol=1e-9, atol=1e-11, msg=k)


@pytest.mark.parametrize('kind', batch_norms())
@pytest.mark.parametrize('shares', ['bn', 'idle'])
def test_batch_norm_of_unequal_shares(ranks, kind, shares):
    "Also where one process has a single row, or none."
    bn, x, weigh = batch_norms()[kind]
    low = x.dtype.itemsize < 4
    one, rank0 = normalized(copy.deepcopy(bn), x, weigh), ranks[0][shares][kind]
    tol = dict(rtol=1e-4, atol=1e-4)
    if x.dtype == torch.float64: tol = dict(rtol=1e-10, atol=1e-10)
    if low: tol = dict(rtol=2e-2, atol=2e-2)
    for k in ('y', 'dx', 'evaluated'):
        together = torch.cat([t[shares][kind][k] for t in ranks])
        assert together.dtype == x.dtype
        torch.testing.assert_close(together, one[k], **tol)
    for i, g in enumerate(one['grads']):
        torch.testing.assert_close(sum(t[shares][kind]['grads'][i] for t in ranks), g, **tol)
    for t in ranks:
        for a, b in zip(t[shares][kind]['buffers'], one['buffers'], strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, **(dict(rtol=1e-5, atol=1e-5) if low else tol))
    if kind == 'channels_last':
        for k in ('y', 'dx'): assert rank0[k].is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_of_less_than_two_rows_is_an_error_in_every_process(ranks):
    for t in ranks:
        none, single = t['too few']
        assert 'more than one value per channel' in none and 'got 0' in none and 'got 1' in single


PATIENCE = 3   # of the collectives, in seconds

def slow_evaluation(rank, world, folder):
    "The first process takes twice as long to evaluate as a collective may wait."
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store', world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=PATIENCE))
    evaluation = OnlineEvalCallback(lambda encoder: time.sleep(2*PATIENCE) or 50., every=1)
    evaluation.learn = SimpleNamespace(epochs_completed=lambda: 1, epoch=0, n_epoch=1, model=nn.Module())
    evaluation.model.encoder = None
    dist.barrier()
    evaluation.after_epoch()
    torch.save(dict(flag=any_rank(rank == 0), accuracies=evaluation.accuracies), f'{folder}/rank{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


def test_an_evaluation_may_take_longer_than_a_collective_waits(tmp_path):
    first, second = launch(slow_evaluation, 2, tmp_path)
    assert first['flag'] and second['flag'] and first['accuracies'] == {1: 50.} and second['accuracies'] == {}


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

@pytest.mark.parametrize('device, backend', [('cpu', 'gloo'), pytest.param('cuda', 'nccl', marks=needs_gpu)])
@pytest.mark.parametrize('kind', ['maps', 'scale_only', 'bare', 'channels_last', 'single', 'half', 'brain'])
def test_the_function_alone_on_a_device(tmp_path, device, backend, kind):
    "A group of one process, so that the collectives run on the device."
    bn, x, weigh = batch_norms()[kind]
    x, weigh, bn = x.to(device), weigh.to(device), bn.to(device)
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path/'store'), 1), rank=0, world_size=1)
    try:
        results = []
        for f in (F.batch_norm, _batch_norm):
            v, ps = x.clone().requires_grad_(), copy.deepcopy(list(bn.parameters()))
            mean, var = bn.running_mean.clone(), bn.running_var.clone()
            weight, bias = (ps + [None, None])[:2]
            y = f(v, mean, var, weight, bias, training=True, momentum=.3)
            results.append([y, *torch.autograd.grad((y.to(weigh.dtype)*weigh).sum(), [v, *ps]), mean, var])
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride()
            tol = 2e-2 if x.dtype.itemsize < 4 else 1e-4
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    finally: dist.destroy_process_group()


def test_unequal_shapes_are_refused_by_all_and_nothing_hangs(ranks):
    last = len(ranks) - 1
    for t in ranks:
        (rows, _), (columns, _) = t['unequal']
        for part in ('equally many rows', 'rank 0: 8x4', f'rank {last}: 6x4', 'drop_last=True'): assert part in rows
        assert f'rank {last}: 8x3' in columns
        close(t['after'], torch.arange(len(ranks)).float().repeat_interleave(2)[:, None])   # the group still works


def test_two_views_are_gathered_as_one_tensor_is_and_views_that_do_not_fit_stop_all(ranks):
    for rank, t in enumerate(ranks):
        assert torch.equal(*t['two views'])
        said, seconds = t['refused views']
        assert seconds < SECONDS/2
        if rank == len(ranks) - 1: assert 'expected two views of one shape (N, D), got (4, 4) and (3, 4)' in said
        else: assert 'gather_rows needs z of shape (2n, D) from every process' in said


def test_whatever_rows_one_process_has_all_of_them_refuse_at_once(ranks):
    last = len(ranks) - 1
    expected = dict(empty=f'rank {last}: 0x4', odd=f'rank {last}: 7x4', all_odd='rank 0: 7x4',
                    flat=f'rank {last}: 1 dimension', scalar=f'rank {last}: 0 dimensions',
                    dtype=f'rank {last}: 8x4 float64', half=f'rank {last}: 8x4 bfloat16',
                    integer='rank 0: 8x4 of another type', narrow='rank 0: 8x0')
    for t in ranks:
        assert t['refused'].keys() == expected.keys()
        for k, (message, seconds) in t['refused'].items():
            assert expected[k] in message and '(2n, D)' in message, message
            assert seconds < SECONDS/4, k
