"Real gloo processes against one process: the loss, its gradient, a LARS step, and what is refused."
import datetime, time

import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_nb.distributed import gather_rows
from simclr_nb.lars import LARS
from simclr_nb.ntxent import nt_xent

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


def take_step(net, x, gather=None):
    "Loss, gradients, and the weights after one step of LARS."
    loss = nt_xent(net(x), gather=gather)
    loss.backward()
    grads = [p.grad.clone() for p in net.parameters()]
    LARS(net.parameters(), lr=2., weight_decay=1e-2).step()
    return dict(loss=loss.detach(), grads=grads, weights=[p.detach().clone() for p in net.parameters()])


def refusal(*shape):
    try: gather_rows(torch.zeros(*shape))
    except ValueError as e: return str(e)


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store', world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=SECONDS))
    mine = torch.cat([v.chunk(world)[rank] for v in batch().chunk(2)])
    seen, first = gather_rows(mine.T.contiguous().T)    # not contiguous: the layout in memory must not matter
    told = dict(seen=seen, first=first, mine=mine)
    told |= take_step(DistributedDataParallel(encoder()), mine, gather_rows)
    with torch.no_grad(): told['evaluated'] = nt_xent(encoder()(mine), gather=gather_rows)
    told['low'] = nt_xent(encoder()(mine).bfloat16(), gather=gather_rows).detach()
    last = rank == world - 1
    told['unequal'] = [refusal(6 if last else 8, 4), refusal(8, 3 if last else 4)]
    told['after'] = gather_rows(torch.full((2, 1), float(rank)))[0]
    torch.save(told, f'{folder}/rank{rank}.pt')
    dist.barrier()  # nobody leaves while another still sends
    dist.destroy_process_group()


def launch(f, world, folder):
    "Run f(rank, world, folder) in `world` fresh processes; never wait longer than 2*SECONDS."
    context = mp.start_processes(f, (world, str(folder)), nprocs=world, join=False, start_method='spawn')
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


def test_unequal_shapes_are_refused_by_all_and_nothing_hangs(told):
    last = len(told) - 1
    for t in told:
        rows, columns = t['unequal']
        assert 'equally many rows' in rows and 'rank 0: 8x4' in rows and f'rank {last}: 6x4' in rows and 'drop_last=True' in rows
        assert f'rank {last}: 8x3' in columns
        close(t['after'], torch.arange(len(told)).float().repeat_interleave(2)[:, None])   # the group still works
