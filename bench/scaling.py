"""A training step on 1, 2, ... processes: what its parts take, a simple model checked against them, and what the model predicts.

    python bench/scaling.py --processes 1,2,4 --table --plot scaling.png

Measured: this machine, CPU, gloo, one thread a process. Modelled: 8 to 128 devices; what is assumed of them are arguments. Prints JSON.
"""
import os
for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
import argparse, datetime, json, math, statistics, tempfile, time, warnings
from pathlib import Path
warnings.simplefilter('ignore')

import cv2, numpy as np, torch, torch.distributed as dist, torch.multiprocessing as mp
from pipeline import sample_images
from simclr_nb.augmentations import make_views, simclr_augmentations
from simclr_nb.data import ImageSet, TwoCropDataset
from simclr_nb.memory import bytes_per_step
from simclr_nb.distributed import gather_rows, global_batch_norm
from simclr_nb.encoder import build_encoder
from simclr_nb.lars import LARS, param_groups
from simclr_nb.ntxent import nt_xent
from simclr_nb.projection import projection_head
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

DIM, PROBE, SMALL = 128, 2**22, 40          # numbers in a row of z; numbers of the message that finds the bandwidth; messages in a row that find the latency
PARTS = 'input', 'compute', 'batch_norm', 'loss', 'gradients', 'optimiser'      # of which a step is the sum


def network(arch):
    torch.manual_seed(0)
    encoder = build_encoder(arch)
    return torch.nn.Sequential(encoder, projection_head(encoder.feature_dim, dim_out=DIM))


def channels(model): return [m.num_features for m in model.modules() if isinstance(m, _BatchNorm)]


def rounds_of(world): return math.ceil(math.log2(world))


def messages(model): return dict(gradients=1 + math.ceil(sum(4*p.numel() for p in model.parameters())/(25*2**20)), rows=3, batch_norm=2*len(channels(model)))


# Measured

def tasks(a, n, rank, world, folder):
    "The parts of a step with n images in this process, each alone, and the whole step."
    augment = simclr_augmentations(a.size)
    pairs = TwoCropDataset(ImageSet(sorted(Path(folder).glob('*.jpg'))), augment)
    alone, shared = network(a.arch), DistributedDataParallel(global_batch_norm(network(a.arch)), broadcast_buffers=False)
    globally = global_batch_norm(network(a.arch))
    opts = {m: LARS(param_groups(m), lr=.1, weight_decay=1e-6) for m in (alone, shared)}
    x, dz, z = torch.rand(2*n, 3, a.size, a.size), torch.randn(2*n, DIM)/100, torch.randn(2*n, DIM)
    every = torch.cat([z]*world)
    flat, probe, one = torch.zeros(sum(p.numel() for p in alone.parameters())), torch.zeros(PROBE), torch.zeros(1)
    def views():
        crops, rows, _ = zip(*[pairs[(rank*n + i) % len(pairs)] for i in range(n)])
        return make_views(augment, torch.stack(crops), torch.from_numpy(np.stack(rows)))
    def loss(gather):
        rows = z.clone().requires_grad_()
        nt_xent(rows, gather=gather).backward()
    def norms():
        for c in channels(alone):
            dist.all_gather([torch.zeros(2*c + 1) for _ in range(world)], torch.zeros(2*c + 1))
            dist.all_reduce(torch.zeros(2*c))
    def step():
        nt_xent(shared(views()), gather=gather_rows).backward()
        opts[shared].step(); opts[shared].zero_grad()
    def backward(net):
        net.zero_grad()
        net(x).backward(dz)
    return dict(input=views, compute=lambda: backward(alone), with_global_norm=lambda: backward(globally), loss=lambda: loss(gather_rows),
        loss_alone=lambda: loss(lambda own: (every, rank*len(own))), gradients=lambda: dist.all_reduce(flat), norm_messages=norms,
        optimiser=opts[alone].step, small=lambda: [dist.all_reduce(one) for _ in range(SMALL)], probe=lambda: dist.all_reduce(probe), step=step)


def worker(rank, world, folder, a, n):
    torch.set_num_threads(1); cv2.setNumThreads(1)
    dist.init_process_group('gloo', store=dist.FileStore(f'{folder}/store{world}-{n}', world), rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    todo = tasks(a, n, rank, world, folder)
    times = {k: [] for k in todo}
    for i in range(a.rounds + 1):                    # in turns, so that a busy moment hits all of them; the first round warms up
        for k, f in todo.items():
            dist.barrier()
            start = time.perf_counter()
            f()
            took = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)                # a part is done when the last process is
            if i: times[k].append(took.item())
    if rank == 0: Path(folder, 'told.json').write_text(json.dumps({k: statistics.median(v) for k, v in times.items()}))
    dist.barrier()
    dist.destroy_process_group()


def measure(world, n, a, folder):
    "Median seconds of each part with n images in each of `world` processes."
    mp.start_processes(worker, (world, folder, a, n), nprocs=world, start_method='fork' if 'fork' in mp.get_all_start_methods() else 'spawn')
    t = json.loads(Path(folder, 'told.json').read_text())
    t['batch_norm'] = max(0., t['with_global_norm'] - t['compute'])      # statistics over all rows, their messages, and waiting for each other
    if world == 1: t['gradients'] = 0.
    return t


# Modelled

def link(t, world):
    "Latency of a round, from all-reduces of one number, and bytes per second, from one of many."
    once = t['small']/SMALL
    return once/rounds_of(world), 2*(world - 1)/world*4*PROBE/(t['probe'] - once)


def sending(model, bs, world, latency, bandwidth):
    "Seconds for gradients, rows and batch norm: bytes/bandwidth + latency times rounds times messages."
    sent, count = bytes_per_step(model, bs, world, DIM), messages(model)
    return {k: sent[k]/bandwidth + latency*rounds_of(world)*count[k] for k in sent}


def modelled(model, world, n, t, first, n_first, fitted):
    """Seconds of each part. Given: images per second of a device while all compute (cores are shared, so it is no constant here).
    Everything else follows from one process alone, slowed down as much as compute is, and from the link fitted on two."""
    comm, slower = sending(model, n*world, world, fitted['latency'], fitted['bandwidth']), t['compute']/(first['compute']*n/n_first)
    return dict(input=first['input']*n/n_first*slower, compute=t['compute'], batch_norm=comm['batch_norm'] + (world > 1)*fitted['norm_share']*t['compute'],
                loss=first['loss_alone']*(n/n_first)**2*world*slower + comm['rows'], gradients=comm['gradients'], optimiser=first['optimiser']*slower)


def check(a, model, runs):
    "Each measured configuration beside the model."
    first, second = runs[1, a.images], runs.get((2, a.images))
    fitted = dict(latency=0., bandwidth=math.inf, norm_share=0.)
    if second:
        fitted['latency'], fitted['bandwidth'] = link(second, 2)
        own = second['batch_norm'] - sending(model, 2*a.images, 2, fitted['latency'], fitted['bandwidth'])['batch_norm']
        fitted['norm_share'] = max(0., own)/second['compute']
    rows = []
    for (world, n), t in runs.items():
        said = modelled(model, world, n, t, first, a.images, fitted)
        parts, total = {k: t[k] for k in PARTS}, sum(said.values())
        rows.append(dict(processes=world, images_each=n, images_per_second=round(world*n/t['step'], 1), images_per_second_of_a_device_computing=round(n/t['compute'], 1), ms={k: round(1e3*v, 2) for k, v in parts.items()} | dict(
            norm_messages=round(1e3*t['norm_messages'], 2), step=round(1e3*t['step'], 1)), modelled_ms={k: round(1e3*v, 2) for k, v in said.items()} | dict(step=round(1e3*total, 1)),
            sum_of_parts_over_step=round(sum(parts.values())/t['step'], 3), relative_error=round(total/t['step'] - 1, 3)))
    return fitted, rows


def predict(a, model):
    "Efficiency of 8 to 128 devices: the time that a step computes over the time that it takes."
    found = []
    for bandwidth in a.bandwidth:
        for world in (8, 16, 32, 64, 128):
            n = a.batch/world
            compute, comm = n/a.rate, sending(model, a.batch, world, 1e-6*a.latency, 1e9*bandwidth)
            loss = 3*2*DIM*(2*n)*(2*a.batch)/(1e12*a.loss_tflops)      # similarities, and the gradients of rows and columns
            rest = compute + loss + comm['rows'] + comm['batch_norm']
            after, behind = rest + comm['gradients'], rest + max(0., comm['gradients'] - 2/3*compute)
            found.append(dict(bandwidth_gb=bandwidth, devices=world, ms=dict(compute=round(1e3*compute, 1), loss=round(1e3*loss, 2), **{k: round(1e3*v, 2) for k, v in comm.items()}),
                efficiency=round(compute/after, 3), efficiency_overlapped=round(compute/behind, 3), images_per_second=round(a.batch/behind)))
    return found


# Shown

def table(told):
    lines = ['| processes | images each | ' + ' | '.join(PARTS) + ' | step | modelled | error | images/s |', '|---'*(len(PARTS) + 6) + '|']
    for r in told['measured']:
        lines.append(f'| {r["processes"]} | {r["images_each"]} | ' + ' | '.join(f'{r["ms"][k]:.0f}' for k in PARTS)
                     + f' | {r["ms"]["step"]:.0f} | {r["modelled_ms"]["step"]:.0f} | {r["relative_error"]:+.0%} | {r["images_per_second"]:.1f} |')
    lines += ['', '| GB/s | devices | ' + ' | '.join(told['predicted'][0]['ms']) + ' | efficiency | gradients behind the backward pass |', '|---'*9 + '|']
    for r in told['predicted']:
        lines.append(f'| {r["bandwidth_gb"]:g} | {r["devices"]} | ' + ' | '.join(f'{v:.1f}' for v in r['ms'].values()) + f' | {r["efficiency"]:.0%} | {r["efficiency_overlapped"]:.0%} |')
    return '\n'.join(lines)


def plot(told, path):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter
    plt.rcParams.update({'axes.spines.top': False, 'axes.spines.right': False})
    fig, (ax, ax2) = plt.subplots(1, 2, figsize=(9.6, 3.5))
    rows, colours = told['measured'], ('0.75', '#1f77b4', '#9ecae1', '#2ca02c', '#ff7f0e', '0.45')
    bottom = np.zeros(len(rows))
    for k, c in zip(PARTS, colours):
        height = np.array([r['ms'][k] for r in rows])
        ax.bar(range(len(rows)), height, bottom=bottom, color=c, width=.65, label=k.replace('_', ' '))
        bottom += height
    ax.plot(range(len(rows)), [r['ms']['step'] for r in rows], 'k_', ms=26, mew=1.6, label='whole step')
    ax.plot(range(len(rows)), [r['modelled_ms']['step'] for r in rows], 'o', mfc='w', mec='k', ms=6, label='modelled')
    ax.set_xticks(range(len(rows)), [f'{r["processes"]} × {r["images_each"]}' for r in rows])
    ax.set(xlabel='processes × images each', ylabel='milliseconds', title='Measured: one CPU, gloo')
    ax.legend(frameon=False, fontsize=8, loc='upper left')
    if ax.get_ylim()[1] < 1.25*bottom.max(): ax.set_ylim(0, 1.25*bottom.max())
    for bandwidth, c in zip(told['assumed']['bandwidth_gb'], ('#ff7f0e', '#1f77b4', '#2ca02c', '0.5')*9):
        of = [r for r in told['predicted'] if r['bandwidth_gb'] == bandwidth]
        x = [r['devices'] for r in of]
        ax2.plot(x, [r['efficiency_overlapped'] for r in of], 'o-', ms=4, color=c, label=f'{bandwidth:g} GB/s')
        ax2.plot(x, [r['efficiency'] for r in of], ':', color=c)
    ax2.plot([], [], ':', color='.4', label='gradients after the backward pass')
    ax2.set_xscale('log', base=2); ax2.set_xticks(x, x); ax2.yaxis.set_major_formatter(PercentFormatter(1))
    ax2.set(ylim=(0, 1.03), xlabel=f'devices, {told["assumed"]["batch"]} images in all', ylabel='of the time computing', title=f'Modelled: {told["assumed"]["arch"]}')
    ax2.legend(frameon=False, fontsize=8, loc='lower left')
    fig.tight_layout()
    fig.savefig(path, dpi=100)


def numbers(kind): return lambda text: [kind(x) for x in text.split(',')]


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--processes', type=numbers(int), default=[1, 2], help='1,2 or 1,2,4')
    ask.add_argument('--arch', default='resnet18')
    ask.add_argument('--size', type=int, default=32, help='side of the views')
    ask.add_argument('--images', type=int, default=32, help='images in a process (weak scaling), and in all (strong scaling)')
    ask.add_argument('--rounds', type=int, default=7, help='timed rounds; medians are taken')
    ask.add_argument('--table', action='store_true', help='print tables instead of JSON')
    ask.add_argument('--plot', help='write a figure there')
    them = ask.add_argument_group('assumed of the devices that are predicted (not measured: set them to yours)')
    them.add_argument('--predict-arch', default='resnet50')
    them.add_argument('--batch', type=int, default=4096, help='images in all')
    them.add_argument('--rate', type=float, default=1000., help='images per second that a device trains, both views, by itself')
    them.add_argument('--bandwidth', type=numbers(float), default=[1., 10., 100.], help='GB/s that a device sends')
    them.add_argument('--latency', type=float, default=10., help='microseconds for a round of a message')
    them.add_argument('--loss-tflops', type=float, default=10., help='TFLOP/s that the loss reaches')
    a = ask.parse_args()
    if a.processes[0] != 1 or sorted(set(a.processes)) != a.processes: ask.error(f'--processes starts at 1 and grows, as in 1,2,4; got {a.processes}')
    if any(a.images % w for w in a.processes): ask.error(f'--images {a.images} cannot be shared by {a.processes} processes')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        sample_images(folder, n=64)
        runs = {(w, n): measure(w, n, a, folder) for w in a.processes for n in dict.fromkeys((a.images, a.images//w))}
    fitted, measured = check(a, network(a.arch), runs)
    told = dict(arch=a.arch, size=a.size, cores=cores, rounds=a.rounds, torch=torch.__version__,
        fitted=dict(latency_us=round(1e6*fitted['latency'], 1), bandwidth_gb=round(fitted['bandwidth']/1e9, 3) if math.isfinite(fitted['bandwidth']) else None,
                    norm_share=round(fitted['norm_share'], 3)), measured=measured,
        assumed=dict(arch=a.predict_arch, batch=a.batch, rate=a.rate, bandwidth_gb=a.bandwidth, latency_us=a.latency, loss_tflops=a.loss_tflops),
        predicted=predict(a, network(a.predict_arch)))
    if a.plot: plot(told, a.plot)
    print(table(told) if a.table else json.dumps(told, indent=1))
