"NT-Xent forward and backward beside other libraries' losses, and its metrics: time and peak extra memory, as JSON."
import argparse, json, os, re, resource, statistics, subprocess, sys, time

# Images; pytorch-metric-learning pairs every positive with every negative: 8 N³ numbers in each of its matrices.
PML_N = 128


def ours(torch, tau):
    from simclr_nb.ntxent import nt_xent
    return lambda z: nt_xent(z, tau)


def plain(torch, tau):
    "The whole matrix and cross-entropy."
    def loss(z):
        z = torch.nn.functional.normalize(z, dim=1)
        s = (z @ z.T / tau).fill_diagonal_(-torch.inf)
        return torch.nn.functional.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z)//2))
    return loss


def lightly(torch, tau):
    from lightly.loss import NTXentLoss
    loss = NTXentLoss(tau)
    return lambda z: loss(*z.chunk(2))


def pml(torch, tau):
    from pytorch_metric_learning.losses import NTXentLoss
    loss = NTXentLoss(tau)
    return lambda z: loss(z, torch.arange(len(z)//2, device=z.device).repeat(2))


def metrics(torch, tau):
    "No loss: contrastive accuracy and entropy, without gradient."
    from simclr_nb.ntxent import contrastive_metrics
    def both(z): contrastive_metrics(z, tau)
    return both


def floor(torch, tau):
    """No loss: the similarities, and weights times rows for the gradient, each once, in blocks of 128 rows.
    A bound on time only."""
    def products(z):
        rows = 128 if z.device.type == 'cpu' else 1024
        z = z.detach()
        block, G = torch.empty(min(rows, len(z)), len(z), device=z.device), torch.empty_like(z)
        for a in range(0, len(z), rows):
            q = z[a:a+rows]
            torch.mm(torch.mm(q, z.T, out=block[:len(q)]), z, out=G[a:a+rows])
        return None
    return products


contestants = dict(ours=ours, lightly=lightly, plain=plain, pml=pml, metrics=metrics, floor=floor)


def status(field):
    "A line of /proc/self/status in bytes; None where there is no such file."
    try: return 1024*int(re.search(rf'{field}:\s+(\d+)', open('/proc/self/status').read())[1])
    except OSError: return None


def reset_peak():
    """Resident memory now, and its peak from now on as a function.
    Without Linux's /proc the peak of the whole process counts."""
    try:
        with open('/proc/self/clear_refs', 'w') as f: f.write('5')
        return status('VmRSS'), lambda: status('VmHWM')
    except OSError:
        unit = 1 if sys.platform == 'darwin' else 1024
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*unit
        return peak(), peak


def measure(name, n, dim, tau, reps, threads, device):
    "One contestant, in this process."
    import torch
    torch.set_num_threads(threads)
    cuda = device.startswith('cuda')
    loss = contestants[name](torch, tau)
    def draw(n):
        g = torch.Generator().manual_seed(0)
        return torch.randn(2*n, dim, generator=g).to(device).requires_grad_()

    def step(z):
        z.grad = None
        value = loss(z)
        if value is not None: value.backward()
        if cuda: torch.cuda.synchronize()
        return value and value.item()

    for _ in range(3): step(draw(8))                           # libraries load, threads start
    z = draw(n)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else: before, peak = reset_peak()
    value = step(z)
    extra, times = peak() - before, []
    for _ in range(reps):
        start = time.perf_counter()
        step(z)
        times.append(time.perf_counter() - start)
    return dict(loss=value, memory=extra, times=times, torch=torch.__version__)


def in_own_process(name, n, args, reps):
    command = [sys.executable, __file__, '--only', name, '--n', n, '--dim', args.dim, '--tau', args.tau, '--reps', reps,
               '--threads', args.threads, '--device', args.device]
    env = os.environ | dict(OMP_NUM_THREADS=str(args.threads))
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env)
    if done.returncode: sys.exit(f'{name} failed:\n{done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def compare(runs, n, args, names, reps, rounds):
    "Rounds in turns, so that a busy moment of the machine hits all; the median of a process, the quietest round."
    found = {name: [] for name in names}
    for _ in range(rounds):
        for name in names: found[name].append(in_own_process(name, n, args, reps))
    for name, got in found.items():
        runs[name] = dict(n=n, ms=round(1e3*min(statistics.median(g['times']) for g in got), 3),
            memory_mb=round(statistics.median(g['memory'] for g in got)/1e6, 2), loss=got[0]['loss'])
    return found


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--n', type=int, default=4096, help='images; the loss has 2n rows')
    ask.add_argument('--dim', type=int, default=128)
    ask.add_argument('--tau', type=float, default=.1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    ask.add_argument('--threads', type=int, default=cores)
    ask.add_argument('--device', default='cpu', help='cpu or cuda')
    ask.add_argument('--rounds', type=int, default=3, help='processes for each contestant, in turns')
    ask.add_argument('--reps', type=int, help='timed steps in each process; default: fewer for large n')
    ask.add_argument('--only', choices=contestants, help='measure one contestant in this process')
    args = ask.parse_args()
    reps = args.reps or max(5, min(200, 2**13//args.n))
    if args.only:
        print(json.dumps(measure(args.only, args.n, args.dim, args.tau, reps, args.threads, args.device)))
        sys.exit()
    runs, small = {}, {}
    found = compare(runs, args.n, args, ('ours', 'lightly', 'plain', 'metrics', 'floor'), reps, args.rounds)
    compare(small, min(args.n, PML_N), args, ('ours', 'pml'), 5, 1)
    for group in (runs, small):
        for name, run in group.items():
            if run['loss'] is None: continue
            apart = abs(run['loss'] - group['ours']['loss'])
            assert apart < 1e-4, f'{name} computes something else: {run["loss"]}'

    def ratios(group, other):
        "Of another's time and memory to ours."
        ours = group['ours']
        return {f'ratio_time_{other}': round(group[other]['ms']/ours['ms'], 2),
                f'ratio_memory_{other}': round(group[other]['memory_mb']/ours['memory_mb'], 2)}

    report = dict(n=args.n, rows=2*args.n, dim=args.dim, tau=args.tau, device=args.device, threads=args.threads,
                torch=found['ours'][0]['torch'], rounds=args.rounds, reps=reps, runs=runs, at_the_size_of_pml=small)
    report |= ratios(runs, 'lightly') | ratios(runs, 'plain') | ratios(runs, 'metrics') | ratios(small, 'pml')
    report['time_over_floor'] = round(runs['ours']['ms']/runs['floor']['ms'], 2)
    print(json.dumps(report, indent=1))
