"""A training step, part by part: views on the device, encoder and head, loss, LARS. No fastai, no files.

    python bench/step.py --device cuda                     # ResNet-50 at 224 pixels, several ways
    python bench/step.py --variants fp32,bf16,bf16+compile --arch resnet18 --size 32 --batch-size 256

A variant is one way to take the step, its words joined by +: fp32 or bf16 (autocast) first, then any of contiguous
(instead of channels_last), compile (of the encoder; on a GPU of the augmentation, too), global or sync (the library's
batch norm over all processes, or PyTorch's, in a group of one process: what they cost before anything travels).
Prints JSON.
"""
import argparse, gc, json, signal, statistics, sys, tempfile, time, warnings
from contextlib import contextmanager, nullcontext
from functools import lru_cache
warnings.simplefilter('ignore')

import numpy as np, torch, torch.distributed as dist
from loss import missing
from simclr_nb.data.sources import augmentations_for
from simclr_nb.encoder import build_encoder
from simclr_nb.lars import LARS
from simclr_nb.training.memory import AllocationTracker
from simclr_nb.ntxent import nt_xent
from simclr_nb.training.views import apply_compiled, apply_cpu
from simclr_nb.projection import SimCLR, projection_head
from torch import nn

words = {'fp32', 'bf16', 'contiguous', 'compile', 'global', 'sync'}
parts = 'copy', 'augmentation', 'forward', 'loss', 'backward', 'lars'


class Marks:
    "Moments of a step, on the device's own clock; milliseconds between them."
    def __init__(self, cuda): self.cuda, self.names, self.moments = cuda, [], []
    def __call__(self, name):
        moment = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda: moment.record()
        self.names.append(name)
        self.moments.append(moment)
    def between(self):
        "What passed up to each mark since the one before; call it when the device is done."
        pairs = list(zip(self.moments, self.moments[1:]))
        ms = [a.elapsed_time(b) if self.cuda else 1e3*(b - a) for a, b in pairs]
        return dict(zip(self.names[1:], ms))


@lru_cache(maxsize=1)
def batches(size, n, cuda, several=2):
    "Batches of crops and parameters, as a loader gives them; noise, since no transform depends on what it sees."
    g, made, augment = torch.Generator().manual_seed(0), [], augmentations_for(None, size)
    for k in range(several):
        drawn = [augment.draw_views((0, k, i), size, size)[1] for i in range(n)]
        crops = torch.randint(0, 256, (n, 2, 3, size, size), dtype=torch.uint8, generator=g)
        batch = crops, torch.from_numpy(np.stack(drawn))
        made.append([t.pin_memory() for t in batch] if cuda else batch)
    return made


@contextmanager
def group_of_one(wanted, cuda):
    "A process group of this process alone, where a variant needs one."
    if not wanted:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        if cuda: torch.cuda.set_device(torch.cuda.current_device())
        store = dist.FileStore(f'{folder}/store', 1)
        dist.init_process_group('nccl' if cuda else 'gloo', store=store, rank=0, world_size=1)
        try: yield
        finally: dist.destroy_process_group()


class OursAlone(nn.BatchNorm2d):
    "The library's batch norm over all processes, in a group of one."
    def forward(self, x):
        from simclr_nb.distributed import _batch_norm
        return _batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum,
                           self.eps)


class TorchsAlone(nn.BatchNorm2d):
    "PyTorch's SyncBatchNorm in a group of one, where it would take the plain batch norm."
    def forward(self, x):
        from torch.nn.modules._functions import SyncBatchNorm
        return SyncBatchNorm.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps,
                                   self.momentum, dist.group.WORLD, 1)


def replace_batch_norm(encoder, kind):
    for m in encoder.modules():
        if type(m) is nn.BatchNorm2d: m.__class__ = kind


def trainer(variant, a, n):
    "A function that takes one step with a batch, and marks its parts."
    cuda, has = a.device.startswith('cuda'), set(variant.split('+'))
    torch.manual_seed(0)
    encoder = build_encoder(a.arch, a.size)
    model = SimCLR(encoder, projection_head(encoder.num_features)).to(a.device)
    layout = torch.contiguous_format if 'contiguous' in has else torch.channels_last
    model = model.to(memory_format=layout)
    if 'global' in has: replace_batch_norm(model.encoder, OursAlone)
    if 'sync' in has: replace_batch_norm(model.encoder, TorchsAlone)
    if 'compile' in has: model.encoder.compile()
    opt, augment = LARS(model, lr=.1, weight_decay=1e-6), augmentations_for(None, a.size)
    apply = apply_cpu if not cuda else apply_compiled if 'compile' in has else None

    def step(batch, marks):
        marks('start')
        crops, params = (t.to(a.device, non_blocking=True) for t in batch)
        marks('copy')
        views = augment.views(crops, params, apply).contiguous(memory_format=layout)
        marks('augmentation')
        with torch.autocast(a.device.split(':')[0], torch.bfloat16, enabled='bf16' in has): h, z = model(views)
        marks('forward')
        loss = nt_xent(z, temperature=a.temperature)
        marks('loss')
        loss.backward()
        marks('backward')
        opt.step()
        opt.zero_grad()
        marks('lars')
        return loss.detach()
    return step, batches(a.size, n, cuda)


def measure(variant, a, n):
    "Steps of one variant with n images each: images per second, peak memory, and the share of each part."
    cuda = a.device.startswith('cuda')
    def finish():
        if cuda: torch.cuda.synchronize()
    if cuda: torch.cuda.reset_peak_memory_stats()
    counted = not cuda and 'compile' not in variant                  # on a CPU all tensors alive, in a step not timed
    with AllocationTracker() if counted else nullcontext() as tracker:
        step, data = trainer(variant, a, n)
        losses = [step(data[i % len(data)], Marks(cuda)) for i in range(a.warmup)]
    finish()
    all_marks, began = [], time.perf_counter()
    for i in range(a.steps):
        all_marks.append(Marks(cuda))
        losses.append(step(data[i % len(data)], all_marks[-1]))
    finish()
    seconds = (time.perf_counter() - began)/a.steps
    loss, took = losses[-1].item(), [marks.between() for marks in all_marks]
    assert np.isfinite(loss), f'the loss of {variant} is {loss}'
    ms = {part: statistics.mean(t[part] for t in took) for part in parts}
    total, memory = sum(ms.values()), tracker.peak if counted else torch.cuda.max_memory_allocated() if cuda else None
    return dict(variant=variant, images=n, images_per_second=round(n/seconds, 1), ms=round(1e3*seconds, 2),
                memory_mb=memory and round(memory/1e6, 1), loss=round(loss, 4),
                parts_ms={k: round(v, 3) for k, v in ms.items()},
                shares={k: round(v/total, 4) for k, v in ms.items()},
                between_steps=round(max(0., 1 - total/(1e3*seconds)), 4))


def measure_what_fits(variant, a):
    "The batch is halved until it fits the GPU's memory."
    n = a.batch_size
    while n > 1:
        try: return measure(variant, a, n)
        except torch.cuda.OutOfMemoryError: n //= 2
        free()                                  # only here has the error let go of the tensors
    return dict(variant=variant, left_out='out of memory')


def free():
    "Give back what the last variant held."
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available(): torch.cuda.empty_cache()


class Stopped(BaseException): "SIGTERM: what was measured is printed."

def stop(*_): raise Stopped


def left_out(variant, a):
    "Why a variant cannot be taken here; None if it can."
    has = set(variant.split('+'))
    if 'compile' in has and (why := missing('compiled', a.device)): return why
    if 'sync' in has and not a.device.startswith('cuda'): return "PyTorch's SyncBatchNorm is for GPUs"


def settings():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--device', default='cpu', help='cpu or cuda')
    ask.add_argument('--arch', help='default: resnet50; on a CPU resnet18')
    ask.add_argument('--size', type=int, help='side of the views, pixels; default: 224; on a CPU 64')
    ask.add_argument('--batch-size', type=int, help='images, each with two views; default: 256; on a CPU 16')
    ask.add_argument('--variants', help='with commas; default: fp32,bf16; on a GPU more')
    ask.add_argument('--compile', action='store_true', help='add it to each variant')
    ask.add_argument('--temperature', type=float, default=.1)
    ask.add_argument('--steps', type=int, help='timed; default: 10, on a CPU 3')
    ask.add_argument('--warmup', type=int, help='steps before them; default: 4, on a CPU 1')
    ask.add_argument('--threads', type=int, help="of a CPU; default: PyTorch's")
    ask.add_argument('--tiny', action='store_true', help='a small network, small images, few steps: does it run?')
    a = ask.parse_args()
    gpu = a.device.startswith('cuda')
    usual = dict(arch='resnet50', size=224, batch_size=256, steps=10, warmup=4,
                 variants='fp32,bf16,bf16+global,bf16+sync,fp32+contiguous,bf16+contiguous,bf16+compile') if gpu else \
        dict(arch='resnet18', size=64, batch_size=16, steps=3, warmup=1, variants='fp32,bf16')
    if a.tiny: usual |= dict(arch='resnet18_0.125x', size=32, batch_size=4, steps=2, warmup=1)
    if a.tiny and not gpu: usual['variants'] = 'fp32,bf16,fp32+contiguous,fp32+global,fp32+sync'
    for name, value in usual.items():
        if getattr(a, name) is None: setattr(a, name, value)
    a.variants = [v + '+compile'*(a.compile and 'compile' not in v) for v in a.variants.split(',')]
    for variant in a.variants:
        first, *more = variant.split('+')
        if first not in ('fp32', 'bf16') or set(more) - words:
            ask.error(f'a variant is fp32 or bf16, then of contiguous, compile, global, sync; got {variant}')
    return a


def main():
    a = settings()
    signal.signal(signal.SIGTERM, stop)
    if a.threads: torch.set_num_threads(a.threads)
    gpu, runs, failed = a.device.startswith('cuda'), [], {}
    alone = any(w in ('global', 'sync') for variant in a.variants for w in variant.split('+'))
    with group_of_one(alone, gpu):
        for variant in a.variants:
            if why := left_out(variant, a):
                runs.append(dict(variant=variant, left_out=why))
                continue
            try: runs.append(measure_what_fits(variant, a))
            except Exception as e: failed[variant] = f'{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}'
            except Stopped:
                failed[variant] = 'out of time'
                break
            free()
    card = torch.cuda.get_device_name() if gpu else None
    print(json.dumps(dict(device=a.device, card=card, arch=a.arch, size=a.size, threads=torch.get_num_threads(),
                          torch=torch.__version__, steps=a.steps, runs=runs, failed=failed), indent=1))
    if failed: sys.exit(f'failed: {failed}')


if __name__ == '__main__': main()
