"What a step is said to cost, against what real processes send and what a real network keeps."
import datetime

import pytest, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_nb.memory import AllocationTracker, activation_bytes, bytes_per_step, checkpoint_activations, memory_per_device
from simclr_nb.distributed import gather_rows, global_batch_norm
from simclr_nb.encoder import build_encoder
from simclr_nb.ntxent import nt_xent
from simclr_nb.projection import projection_head
from test_distributed import SECONDS, counted, launch

DIM, IMAGES, SIZE = 16, 6, 32


def network(arch='resnet18'):
    torch.manual_seed(0)
    encoder = build_encoder(arch)
    return nn.Sequential(encoder, projection_head(encoder.feature_dim, dim_out=DIM))


def counting(numbers, bucket):
    "As DistributedDataParallel does by itself, written down."
    numbers.append(bucket.buffer().numel())
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0]/dist.get_world_size())


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store', world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=SECONDS))
    net, sent, buckets = global_batch_norm(network()), [], []
    ddp = DistributedDataParallel(net, broadcast_buffers=False)
    ddp.register_comm_hook(buckets, counting)
    x = torch.rand(2*IMAGES//world, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(rank))
    with counted(sent): nt_xent(ddp(x), gather=gather_rows).backward()
    told = activation_bytes(net, SIZE)                             # asks no other process
    torch.save(dict(sent=sent, buckets=buckets, activations=told), f'{folder}/rank{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


def test_bytes_are_those_that_real_processes_send(tmp_path, world=3):
    "Each collective's numbers, sent round a ring."
    said = bytes_per_step(network(), IMAGES, world, DIM)
    for told in launch(worker, world, tmp_path):
        gradients, shapes = sum(told['buckets']), (4, 4*world)
        sent = [s for s in told['sent'] if s[0] != 'all_reduce' or s[1] not in told['buckets']]   # the hook's own calls are recorded too
        rows = [s for s in sent if s[1:] in [shapes, (2*IMAGES//world*DIM, 2*IMAGES*DIM), (2*IMAGES*DIM, 2*IMAGES//world*DIM)]]
        norms = [s for s in sent if s not in rows]
        assert len(rows) == 3 and len(norms) == 2*sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network().modules())
        def travels(name, given, gives):                            # numbers that one process sends
            return 2*(world - 1)/world*given if name == 'all_reduce' else abs(given - gives)
        assert said['gradients'] == round(4*2*(world - 1)/world*gradients)
        assert said['rows'] == sum((8 if s[1:] == shapes else 4)*travels(*s) for s in rows)
        assert said['batch_norm'] == round(sum(4*travels(*s) for s in norms))
        assert told['activations'] == activation_bytes(network(), SIZE)


def really_kept(net, n, dtype=torch.float32):
    "Bytes of all that the backward pass holds on to, and of z, for n images; with real numbers."
    x, saved, own = torch.rand(2*n, 3, SIZE, SIZE, dtype=dtype), {}, {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    def pack(t):
        saved[t.untyped_storage()._cdata] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): z = net(x)
    return sum(t.untyped_storage().nbytes() for k, t in saved.items() if k not in own) + z.nbytes


@pytest.mark.parametrize('arch, dtype', [('resnet18', torch.float32), ('resnet18', torch.bfloat16), ('resnet50', torch.float64), ('resnet26d', torch.float32)])
def test_activations_are_counted_to_the_byte(arch, dtype):
    net = network(arch)
    said = activation_bytes(net, SIZE, dtype)
    assert net[0].training and next(net.parameters()).device.type == 'cpu', 'the network was changed'
    real = net.to(dtype)
    assert said == (really_kept(real, 5, dtype) - really_kept(real, 3, dtype))/2


def real_peak(net, n):
    x = torch.rand(2*n, 3, SIZE, SIZE)
    with AllocationTracker() as c: net(x).sum().backward()
    return c.peak + x.nbytes


@pytest.mark.parametrize('thin', [False, True])
def test_memory_is_that_of_a_real_step(thin):
    net = checkpoint_activations(network()) if thin else network()
    said, real = memory_per_device(net, SIZE, 64, 2), real_peak(net, 32)
    assert said['activations'] < real < said['activations'] + said['gradients']*1.5
    assert said['weights'] == sum(t.nbytes for t in net.state_dict().values())
    assert said['momentum'] == said['gradients'] == said['buckets'] == 4*sum(p.numel() for p in net.parameters())
    whole = memory_per_device(net, SIZE, 64)
    assert whole['buckets'] == 0 and abs(whole['activations']/said['activations'] - 2) < .2
    assert memory_per_device(net, SIZE, 64, micro_batch=32)['activations'] == said['activations']


def test_checkpointing_keeps_less():
    assert activation_bytes(checkpoint_activations(network()), SIZE) < .7*activation_bytes(network(), SIZE)


@pytest.mark.parametrize('bs, world', [(100, 8), (4, 8)])
def test_a_batch_that_cannot_be_shared_is_refused(bs, world):
    with pytest.raises(ValueError, match=f'multiple of world; got bs={bs}, world={world}'): memory_per_device(network(), SIZE, bs, world)
