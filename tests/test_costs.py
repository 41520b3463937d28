"What a step is estimated to cost, against what real processes send and what a real network keeps."
import datetime

import pytest, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_nb.distributed import gather_rows, global_batch_norm
from simclr_nb.core import Undrawn
from simclr_nb.encoder import build_encoder
from simclr_nb.training.memory import (AllocationTracker, activation_bytes, bytes_per_step, checkpoint_activations,
                              memory_per_device)
from simclr_nb.ntxent import nt_xent
from simclr_nb.projection import SimCLR, projection_head
from test_distributed import SECONDS, counted, launch

DIM, IMAGES, SIZE = 16, 6, 32


def network(arch='resnet18'):
    with Undrawn(): encoder = build_encoder(arch)               # what is counted does not depend on the weights
    return SimCLR(encoder, projection_head(encoder.num_features, dim_out=DIM))


def counting(numbers, bucket):
    "As DistributedDataParallel does by itself, written down."
    numbers.append(bucket.buffer().numel())
    total = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return total.then(lambda f: f.value()[0]/dist.get_world_size())


def worker(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store', world), rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=SECONDS))
    net, sent, buckets = global_batch_norm(network()), [], []
    ddp = DistributedDataParallel(net, broadcast_buffers=False)
    ddp.register_comm_hook(buckets, counting)
    x = torch.rand(2*IMAGES//world, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(rank))
    with counted(sent):
        h, z = ddp(x)
        nt_xent(z, gather=gather_rows).backward()
    activations = activation_bytes(ddp, SIZE)                             # asks no other process
    torch.save(dict(sent=sent, buckets=buckets, activations=activations), f'{folder}/rank{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.process
def test_bytes_are_those_that_real_processes_send(tmp_path, world=3):
    "Each collective's numbers, sent round a ring."
    estimate = bytes_per_step(network(), IMAGES, world, DIM)
    for real in launch(worker, world, tmp_path):
        gradients, shapes = sum(real['buckets']), (4, 4*world)
        # the hook's own calls are recorded too
        sent = [s for s in real['sent'] if s[0] != 'all_reduce' or s[1] not in real['buckets']]
        own, all_rows = 2*IMAGES//world*DIM, 2*IMAGES*DIM
        rows = [s for s in sent if s[1:] in [shapes, (own, all_rows), (all_rows, own)]]
        norms = [s for s in sent if s not in rows]
        layers = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network().modules())
        assert len(rows) == 3 and len(norms) == 2*layers
        def travels(name, given, gives):                            # numbers that one process sends
            return 2*(world - 1)/world*given if name == 'all_reduce' else abs(given - gives)
        assert estimate['gradients'] == round(4*2*(world - 1)/world*gradients)
        assert estimate['rows'] == sum((8 if s[1:] == shapes else 4)*travels(*s) for s in rows)
        assert estimate['batch_norm'] == round(sum(4*travels(*s) for s in norms))
        assert real['activations'] == activation_bytes(network(), SIZE)


def really_kept(net, n, dtype=torch.float32):
    "Bytes of all that the backward pass holds on to, and of z, for n images; with real numbers."
    x, saved = torch.rand(2*n, 3, SIZE, SIZE, dtype=dtype), {}
    own = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}
    def pack(t):
        saved[t.untyped_storage()._cdata] = t
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): h, z = net(x)
    return sum(t.untyped_storage().nbytes() for k, t in saved.items() if k not in own) + z.nbytes


@pytest.mark.parametrize('arch, dtype', [('resnet18', torch.float32), ('resnet18', torch.bfloat16),
                                         ('resnet50', torch.float64), ('timm:resnet26d', torch.float32)])
def test_activations_are_counted_to_the_byte(arch, dtype):
    net = network(arch)
    estimate = activation_bytes(net, SIZE, dtype)
    assert net.encoder.training and next(net.parameters()).device.type == 'cpu', 'the network was changed'
    real = net.to(dtype)
    assert estimate == (really_kept(real, 5, dtype) - really_kept(real, 3, dtype))/2


def test_a_network_that_gives_z_only_is_counted_too():
    net = network()
    assert activation_bytes(nn.Sequential(net.encoder, net.head), SIZE) == activation_bytes(net, SIZE)


def real_peak(net, n):
    x = torch.rand(2*n, 3, SIZE, SIZE)
    with AllocationTracker() as tracker:
        h, z = net(x)
        z.sum().backward()
    return tracker.peak + x.nbytes


@pytest.mark.parametrize('thin', [False, True])
def test_memory_is_that_of_a_real_step(thin):
    net = checkpoint_activations(network()) if thin else network()
    per_image = activation_bytes(net, SIZE)
    estimate, real = memory_per_device(net, SIZE, 64, 2), real_peak(net, 32)
    assert estimate['activations'] < real < estimate['activations'] + estimate['gradients']*1.5
    assert estimate['weights'] == sum(t.nbytes for t in net.state_dict().values())
    numbers = sum(p.numel() for p in net.parameters())
    assert estimate['momentum'] == estimate['gradients'] == estimate['buckets'] == 4*numbers
    whole = memory_per_device(net, SIZE, 64)
    assert whole['buckets'] == 0 and abs(whole['activations']/estimate['activations'] - 2) < .2
    assert memory_per_device(net, SIZE, 64, micro_batch=32)['activations'] == estimate['activations']
    net.micro_batch = 32
    assert memory_per_device(net, SIZE, 64)['activations'] == estimate['activations']
    assert activation_bytes(net, SIZE) == per_image, 'of an image, in whatever pieces they come'


def test_checkpointing_keeps_less():
    assert activation_bytes(checkpoint_activations(network()), SIZE) < .7*activation_bytes(network(), SIZE)


@pytest.mark.parametrize('batch_size, world_size', [(100, 8), (4, 8)])
def test_a_batch_that_cannot_be_shared_is_refused(batch_size, world_size):
    words = f'multiple of world_size; got batch_size={batch_size}, world_size={world_size}'
    with pytest.raises(ValueError, match=words): memory_per_device(network(), SIZE, batch_size, world_size)
