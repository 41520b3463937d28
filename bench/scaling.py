"""A training step on 1, 2, ... processes: what its parts take, a model checked against them, and what it predicts.

    python bench/scaling.py --processes 1,2,4 --table --plot scaling.png

Measured: this machine, CPU, gloo, one thread a process. Modeled: 8 to 128 devices; what is assumed of them is given
by arguments. Prints JSON.
"""
import os
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
import argparse, datetime, json, math, statistics, tempfile, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')

import cv2, numpy as np, torch, torch.distributed as dist, torch.multiprocessing as mp
from pipeline import sample_images
from simclr_nb.augmentations import simclr_augmentations
from simclr_nb.data.datasets import TwoCropDataset
from simclr_nb.data.sets import ImageSet
from simclr_nb.distributed import gather_rows, global_batch_norm
from simclr_nb.encoder import build_encoder
from simclr_nb.lars import LARS, param_groups
from simclr_nb.training.memory import bytes_per_step
from simclr_nb.ntxent import nt_xent
from simclr_nb.projection import SimCLR, projection_head
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

DIM = 128           # numbers in a row of z
PROBE = 2**22       # numbers of the message that finds the bandwidth
SMALL = 40          # messages in a row that find the latency
PARTS = 'input', 'compute', 'batch_norm', 'loss', 'gradients', 'optimizer'      # of which a step is the sum


def network(arch):
    torch.manual_seed(0)
    encoder = build_encoder(arch)
    return SimCLR(encoder, projection_head(encoder.num_features, dim_out=DIM))


def channels(model): return [m.num_features for m in model.modules() if isinstance(m, _BatchNorm)]


def rounds_of(world_size): return math.ceil(math.log2(world_size))


def messages(model):
    "How many of each kind a step sends."
    gradients = sum(4*p.numel() for p in model.parameters())
    return dict(gradients=1 + math.ceil(gradients/(25*2**20)), rows=3, batch_norm=2*len(channels(model)))


# Measured

def tasks(a, n, rank, world_size, folder):
    "The parts of a step with n images in this process, each alone, and the whole step."
    augment = simclr_augmentations(a.size)
    pairs = TwoCropDataset(ImageSet(sorted(Path(folder).glob('*.jpg'))), augment)
    alone, globally = network(a.arch), global_batch_norm(network(a.arch))
    shared = DistributedDataParallel(global_batch_norm(network(a.arch)), broadcast_buffers=False)
    opts = {m: LARS(param_groups(m), lr=.1, weight_decay=1e-6) for m in (alone, shared)}
    x, dz, z = torch.rand(2*n, 3, a.size, a.size), torch.randn(2*n, DIM)/100, torch.randn(2*n, DIM)
    all_rows = torch.cat([z]*world_size)
    flat, probe, one = torch.zeros(sum(p.numel() for p in alone.parameters())), torch.zeros(PROBE), torch.zeros(1)

    def views():
        items = [pairs[0, (rank*n + i) % len(pairs)] for i in range(n)]
        crops, params, *_ = default_collate(items)
        return augment.views(crops, params)

    def loss(gather):
        rows = z.clone().requires_grad_()
        nt_xent(rows, gather=gather).backward()

    def norms():
        for c in channels(alone):
            dist.all_gather([torch.zeros(2*c + 1) for _ in range(world_size)], torch.zeros(2*c + 1))
            dist.all_reduce(torch.zeros(2*c))

    def step():
        h, z = shared(views())
        nt_xent(z, gather=gather_rows).backward()
        opts[shared].step()
        opts[shared].zero_grad()

    def backward(net):
        net.zero_grad()
        h, z = net(x)
        z.backward(dz)

    def small():
        for _ in range(SMALL): dist.all_reduce(one)

    return dict(input=views, compute=lambda: backward(alone), with_global_norm=lambda: backward(globally),
        loss=lambda: loss(gather_rows), loss_alone=lambda: loss(lambda own: (all_rows, rank*len(own))),
        gradients=lambda: dist.all_reduce(flat), norm_messages=norms, optimizer=opts[alone].step,
        small=small, probe=lambda: dist.all_reduce(probe), step=step)


def worker(rank, world_size, folder, a, n):
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store{world_size}-{n}', world_size), rank=rank,
        world_size=world_size, timeout=datetime.timedelta(seconds=120))
    todo = tasks(a, n, rank, world_size, folder)
    times = {k: [] for k in todo}
    for i in range(a.rounds + 1):           # in turns, so that a busy moment hits all of them; the first round warms up
        for k, f in todo.items():
            dist.barrier()
            start = time.perf_counter()
            f()
            took = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)                # a part is done when the last process is
            if i: times[k].append(took.item())
    if rank == 0: Path(folder, 'times.json').write_text(json.dumps({k: statistics.median(v) for k, v in times.items()}))
    dist.barrier()
    dist.destroy_process_group()


def measure(world_size, n, a, folder):
    "Median seconds of each part with n images in each process."
    how = 'fork' if 'fork' in mp.get_all_start_methods() else 'spawn'
    mp.start_processes(worker, (world_size, folder, a, n), nprocs=world_size, start_method=how)
    t = json.loads(Path(folder, 'times.json').read_text())
    # statistics over all rows, their messages, and waiting for each other
    t['batch_norm'] = max(0., t['with_global_norm'] - t['compute'])
    if world_size == 1: t['gradients'] = 0.
    return t


# Modeled

def link(t, world_size):
    "Latency of a round, from all-reduces of one number, and bytes per second, from one of many."
    once = t['small']/SMALL
    return once/rounds_of(world_size), 2*(world_size - 1)/world_size*4*PROBE/(t['probe'] - once)


def sending(model, batch_size, world_size, latency, bandwidth):
    "Seconds for gradients, rows and batch norm: bytes/bandwidth + latency times rounds times messages."
    sent, count = bytes_per_step(model, batch_size, world_size, DIM), messages(model)
    return {k: sent[k]/bandwidth + latency*rounds_of(world_size)*count[k] for k in sent}


def modeled(model, world_size, n, t, first, n_first, fitted):
    """Seconds of each part.

    Given: images per second of a device while all compute (cores are shared, so it is no constant here).
    All else follows from one process alone, slowed down as much as compute is, and from the link fitted on two.
    """
    comm = sending(model, n*world_size, world_size, fitted['latency'], fitted['bandwidth'])
    slower = t['compute']/(first['compute']*n/n_first)
    return dict(input=first['input']*n/n_first*slower, compute=t['compute'],
        batch_norm=comm['batch_norm'] + (world_size > 1)*fitted['norm_share']*t['compute'],
        loss=first['loss_alone']*(n/n_first)**2*world_size*slower + comm['rows'],
        gradients=comm['gradients'], optimizer=first['optimizer']*slower)


def fit(model, images, second):
    "Latency, bandwidth and what global batch norm computes, from a run on two processes."
    if second is None: return dict(latency=0., bandwidth=math.inf, norm_share=0.)
    latency, bandwidth = link(second, 2)
    own = second['batch_norm'] - sending(model, 2*images, 2, latency, bandwidth)['batch_norm']
    return dict(latency=latency, bandwidth=bandwidth, norm_share=max(0., own)/second['compute'])


def ms(seconds): return {k: round(1e3*v, 2) for k, v in seconds.items()}


def check(a, model, runs):
    "Each measured configuration beside the model."
    first, rows = runs[1, a.images], []
    fitted = fit(model, a.images, runs.get((2, a.images)))
    for (world_size, n), t in runs.items():
        estimate = modeled(model, world_size, n, t, first, a.images, fitted)
        parts, total = {k: t[k] for k in PARTS}, sum(estimate.values())
        rows.append(dict(processes=world_size, images_each=n, images_per_second=round(world_size*n/t['step'], 1),
            images_per_second_of_a_device_computing=round(n/t['compute'], 1),
            ms=ms(parts | dict(norm_messages=t['norm_messages'], step=t['step'])),
            modeled_ms=ms(estimate | dict(step=total)),
            sum_of_parts_over_step=round(sum(parts.values())/t['step'], 3),
            relative_error=round(total/t['step'] - 1, 3)))
    return fitted, rows


def predict(a, model):
    "Efficiency of 8 to 128 devices: the time that a step computes over the time that it takes."
    return [predicted(a, model, bandwidth, w) for bandwidth in a.bandwidth for w in (8, 16, 32, 64, 128)]


def predicted(a, model, bandwidth, world_size):
    n = a.batch/world_size
    compute, comm = n/a.rate, sending(model, a.batch, world_size, 1e-6*a.latency, 1e9*bandwidth)
    # similarities, and the gradients of rows and columns
    loss = 3*2*DIM*(2*n)*(2*a.batch)/(1e12*a.loss_tflops)
    rest = compute + loss + comm['rows'] + comm['batch_norm']
    after, behind = rest + comm['gradients'], rest + max(0., comm['gradients'] - 2/3*compute)
    return dict(bandwidth_gb=bandwidth, devices=world_size, ms=ms(dict(compute=compute, loss=loss) | comm),
        efficiency=round(compute/after, 3), efficiency_overlapped=round(compute/behind, 3),
        images_per_second=round(a.batch/behind))


# Shown

def table(found):
    head = ['processes', 'images each', *PARTS, 'step', 'modeled', 'error', 'images/s']
    lines = ['| ' + ' | '.join(head) + ' |', '|---'*len(head) + '|']
    lines += [f'| {r["processes"]} | {r["images_each"]} | ' + ' | '.join(f'{r["ms"][k]:.0f}' for k in PARTS)
              + f' | {r["ms"]["step"]:.0f} | {r["modeled_ms"]["step"]:.0f} | {r["relative_error"]:+.0%}'
              + f' | {r["images_per_second"]:.1f} |' for r in found['measured']]
    head = ['GB/s', 'devices', *found['predicted'][0]['ms'], 'efficiency', 'gradients behind the backward pass']
    lines += ['', '| ' + ' | '.join(head) + ' |', '|---'*len(head) + '|']
    for r in found['predicted']:
        lines.append(f'| {r["bandwidth_gb"]:g} | {r["devices"]} | ' + ' | '.join(f'{v:.1f}' for v in r['ms'].values())
            + f' | {r["efficiency"]:.0%} | {r["efficiency_overlapped"]:.0%} |')
    return '\n'.join(lines)


def plot_measured(ax, rows):
    colors, bottom = ('0.75', '#1f77b4', '#9ecae1', '#2ca02c', '#ff7f0e', '0.45'), np.zeros(len(rows))
    for k, c in zip(PARTS, colors):
        height = np.array([r['ms'][k] for r in rows])
        ax.bar(range(len(rows)), height, bottom=bottom, color=c, width=.65, label=k.replace('_', ' '))
        bottom += height
    ax.plot(range(len(rows)), [r['ms']['step'] for r in rows], 'k_', ms=26, mew=1.6, label='whole step')
    ax.plot(range(len(rows)), [r['modeled_ms']['step'] for r in rows], 'o', mfc='w', mec='k', ms=6, label='modeled')
    ax.set_xticks(range(len(rows)), [f'{r["processes"]} × {r["images_each"]}' for r in rows])
    ax.set(xlabel='processes × images each', ylabel='milliseconds', title='Measured: one CPU, gloo')
    ax.legend(frameon=False, fontsize=8, loc='upper left')
    if ax.get_ylim()[1] < 1.25*bottom.max(): ax.set_ylim(0, 1.25*bottom.max())


def plot_predicted(ax, found):
    from matplotlib.ticker import PercentFormatter
    for bandwidth, c in zip(found['assumed']['bandwidth_gb'], ('#ff7f0e', '#1f77b4', '#2ca02c', '0.5')*9):
        of = [r for r in found['predicted'] if r['bandwidth_gb'] == bandwidth]
        x = [r['devices'] for r in of]
        ax.plot(x, [r['efficiency_overlapped'] for r in of], 'o-', ms=4, color=c, label=f'{bandwidth:g} GB/s')
        ax.plot(x, [r['efficiency'] for r in of], ':', color=c)
    ax.plot([], [], ':', color='.4', label='gradients after the backward pass')
    ax.set_xscale('log', base=2)
    ax.set_xticks(x, x)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set(ylim=(0, 1.03), xlabel=f'devices, {found["assumed"]["batch"]} images in all', ylabel='of the time computing',
           title=f'Modeled: {found["assumed"]["arch"]}')
    ax.legend(frameon=False, fontsize=8, loc='lower left')


def plot(found, path):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.rcParams.update({'axes.spines.top': False, 'axes.spines.right': False})
    fig, (ax, ax2) = plt.subplots(1, 2, figsize=(9.6, 3.5))
    plot_measured(ax, found['measured'])
    plot_predicted(ax2, found)
    fig.tight_layout()
    fig.savefig(path, dpi=100)


def numbers(kind): return lambda text: [kind(x) for x in text.split(',')]


def arguments():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--processes', type=numbers(int), default=[1, 2], help='1,2 or 1,2,4')
    ask.add_argument('--arch', default='resnet18')
    ask.add_argument('--size', type=int, default=32, help='side of the views')
    ask.add_argument('--images', type=int, default=32, help='images in a process (weak scaling), or in all (strong)')
    ask.add_argument('--rounds', type=int, default=7, help='timed rounds; medians are taken')
    ask.add_argument('--table', action='store_true', help='print tables instead of JSON')
    ask.add_argument('--plot', help='write a figure there')
    them = ask.add_argument_group('assumed of the devices that are predicted (not measured: set them to yours)')
    them.add_argument('--predict-arch', default='resnet50')
    them.add_argument('--batch', type=int, default=4096, help='images in all')
    them.add_argument('--rate', type=float, default=1000., help='images per second of a device by itself, both views')
    them.add_argument('--bandwidth', type=numbers(float), default=[1., 10., 100.], help='GB/s that a device sends')
    them.add_argument('--latency', type=float, default=10., help='microseconds for a round of a message')
    them.add_argument('--loss-tflops', type=float, default=10., help='TFLOP/s that the loss reaches')
    a = ask.parse_args()
    if a.processes[0] != 1 or sorted(set(a.processes)) != a.processes:
        ask.error(f'--processes starts at 1 and grows, as in 1,2,4; got {a.processes}')
    if any(a.images % w for w in a.processes):
        ask.error(f'--images {a.images} cannot be shared by {a.processes} processes')
    return a


def main():
    a = arguments()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        sample_images(folder, n=64)
        runs = {(w, n): measure(w, n, a, folder) for w in a.processes for n in dict.fromkeys((a.images, a.images//w))}
    fitted, measured = check(a, network(a.arch), runs)
    bandwidth = round(fitted['bandwidth']/1e9, 3) if math.isfinite(fitted['bandwidth']) else None
    found = dict(arch=a.arch, size=a.size, cores=cores, rounds=a.rounds, torch=torch.__version__,
        fitted=dict(latency_us=round(1e6*fitted['latency'], 1), bandwidth_gb=bandwidth,
                    norm_share=round(fitted['norm_share'], 3)),
        measured=measured,
        assumed=dict(arch=a.predict_arch, batch=a.batch, rate=a.rate, bandwidth_gb=a.bandwidth, latency_us=a.latency,
                     loss_tflops=a.loss_tflops),
        predicted=predict(a, network(a.predict_arch)))
    if a.plot: plot(found, a.plot)
    print(table(found) if a.table else json.dumps(found, indent=1))


if __name__ == '__main__': main()
