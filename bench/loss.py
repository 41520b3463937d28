"NT-Xent forward and backward beside other libraries' losses, and its metrics: time and peak extra memory, as JSON."
import argparse, json, os, re, resource, shutil, statistics, subprocess, sys, time
from importlib.util import find_spec

# Images; pytorch-metric-learning pairs every positive with every negative: 8 N³ numbers in each of its matrices.
PML_N = 128


def ours(torch, tau):
    from simclr_nb.ntxent import nt_xent
    return lambda z: nt_xent(z, temperature=tau)


def plain(torch, tau):
    "The whole matrix and cross-entropy."
    def loss(z):
        z = torch.nn.functional.normalize(z, dim=1)
        s = (z @ z.T / tau).fill_diagonal_(-torch.inf)
        return torch.nn.functional.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z)//2))
    return loss


def compiled(torch, tau):
    "The plain four lines, compiled anew for each size."
    torch._dynamo.reset()
    return torch.compile(plain(torch, tau), dynamic=False)


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
        block, G = torch.empty(min(rows, len(z)), len(z), device=z.device, dtype=z.dtype), torch.empty_like(z)
        for a in range(0, len(z), rows):
            q = z[a:a+rows]
            torch.mm(torch.mm(q, z.T, out=block[:len(q)]), z, out=G[a:a+rows])
        return None
    return products


contestants = dict(ours=ours, lightly=lightly, plain=plain, compiled=compiled, pml=pml, metrics=metrics, floor=floor)
# Bytes that a contestant holds at its peak for each number of the whole matrix, at least.
held = dict(lightly=8, plain=8, compiled=4)
tolerance = dict(fp32=1e-4, bf16=2e-2)


def missing(name, device):
    "Why a contestant cannot take part here; None if it can."
    package = dict(lightly='lightly', pml='pytorch_metric_learning').get(name)
    if package and not find_spec(package): return f'{package} is not installed'
    if name != 'compiled': return None
    if not any(shutil.which(c) for c in (os.environ.get('CXX', 'c++'), 'g++', 'clang++', 'gcc', 'cc')):
        return 'there is no C compiler'
    if device.startswith('cuda') and not find_spec('triton'): return 'triton is not installed'


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


def free_memory(torch, device):
    "Bytes that are free on the device; None where nobody says."
    if device.startswith('cuda'): return torch.cuda.mem_get_info()[0]
    try: return 1024*int(re.search(r'MemAvailable:\s+(\d+)', open('/proc/meminfo').read())[1])
    except OSError: return None


def product_rate(torch, dtype, device):
    "FLOP/s of one large matrix product, the best of some."
    n, times = 8192 if device.startswith('cuda') else 1024 if dtype == 'float32' else 512, []
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=g).to(device, getattr(torch, dtype)) for _ in range(2))
    while len(times) < 3 or (len(times) < 10 and sum(times) < 1):
        start = time.perf_counter()
        a @ b
        if device.startswith('cuda'): torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2*n**3/min(times)


def measure(name, n, kind, a):
    "One contestant at one size, in this process. `kind`: fp32 or bf16."
    import torch
    torch.set_num_threads(a.threads)
    cuda, dtype = a.device.startswith('cuda'), dict(fp32='float32', bf16='bfloat16')[kind]
    if name == 'peak': return dict(flops=product_rate(torch, dtype, a.device))
    free = free_memory(torch, a.device)
    if free and 4*n*n*held.get(name, 0) > free:
        return dict(left_out=f'needs {4e-9*n*n*held[name]:.0f} GB or more, and {free/1e9:.0f} are free')
    loss = contestants[name](torch, a.tau)
    def draw(n):
        g = torch.Generator().manual_seed(0)
        return torch.randn(2*n, a.dim, generator=g).to(a.device, getattr(torch, dtype)).requires_grad_()

    def step(z):
        z.grad = None
        with torch.autocast(a.device.split(':')[0], torch.bfloat16, enabled=kind == 'bf16'): value = loss(z)
        if value is not None: value.backward()
        if cuda: torch.cuda.synchronize()
        return value and value.item()

    for _ in range(3): step(draw(n if name == 'compiled' else 8))            # libraries load, threads start
    z = draw(n)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else: before, peak = reset_peak()
    value = step(z)
    extra, times = peak() - before, []
    for _ in range(a.reps or default_reps(n)):
        start = time.perf_counter()
        step(z)
        times.append(time.perf_counter() - start)
    return dict(loss=value, memory=extra, times=times, torch=torch.__version__)


def default_reps(n): return max(5, min(200, 2**13//n))


def measure_all(name, a):
    "A line of JSON for each size, as soon as it is known."
    import torch
    for kind in a.dtype:
        for n in a.n[:1] if name == 'peak' else a.n:
            try: found = measure(name, n, kind, a)
            except torch.cuda.OutOfMemoryError: found = dict(left_out='out of memory')
            print(json.dumps(dict(n=n, dtype=kind) | found), flush=True)
            if a.device.startswith('cuda'): torch.cuda.empty_cache()


def in_own_process(name, ns, kinds, a):
    "What a contestant measures in a process of its own, by (dtype, n); and what went wrong, or None."
    settings = dict(only=name, n=listed(ns), dim=a.dim, tau=a.tau, dtype=listed(kinds), threads=a.threads,
                    device=a.device) | (dict(reps=a.reps) if a.reps else {})
    command = [sys.executable, __file__, *(str(word) for k, v in settings.items() for word in (f'--{k}', v))]
    env = os.environ | dict(OMP_NUM_THREADS=str(a.threads))
    left = a.end - time.monotonic()
    if left <= 0: return {}, out_of_time
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=left)
        said, wrong = done.stdout, done.stderr.strip().splitlines()[-1:] or [f'exit code {done.returncode}']
        if not done.returncode: wrong = [None]
    except subprocess.TimeoutExpired as e: said, wrong = (e.stdout or b'').decode(), [out_of_time]
    lines = [json.loads(line) for line in said.splitlines() if line.startswith('{"n"') and line.endswith('}')]
    return {(line['dtype'], line['n']): line for line in lines}, wrong[0]


out_of_time = 'out of time'
def listed(values): return ','.join(map(str, values))


def one_round(name, a):
    "On a GPU one process for all sizes; on a CPU, where only a fresh process shows its peak, one for each."
    if a.device.startswith('cuda') or a.together or name == 'peak': return in_own_process(name, a.n, a.dtype, a)
    found, wrong = {}, None
    for kind in a.dtype:
        for n in a.n:
            some, failed = in_own_process(name, [n], [kind], a)
            found, wrong = found | some, wrong or failed
    return found, wrong


def compare(names, a):
    "Rounds in turns, so that a busy moment of the machine hits all: (found by name and (dtype, n), failed by name)."
    found, failed = {}, {}
    for _ in range(a.rounds):
        for name in names:
            got, wrong = one_round(name, a)
            if wrong: failed[name] = wrong
            for key, one in got.items(): found.setdefault(name, {}).setdefault(key, []).append(one)
    return found, failed


def summary(got, n):
    "The median of a process, the quietest round."
    if 'left_out' in got[0]: return dict(n=n, left_out=got[0]['left_out'])
    return dict(n=n, ms=round(1e3*min(statistics.median(g['times']) for g in got), 3),
                memory_mb=round(statistics.median(g['memory'] for g in got)/1e6, 2), loss=got[0]['loss'])


def at_size(found, key):
    "Every contestant at one size, and a check that all compute the same."
    runs = {name: summary(got[key], key[1]) for name, got in found.items() if key in got and name != 'peak'}
    for name, run in runs.items():
        if run.get('loss') is None or runs.get('ours', {}).get('loss') is None: continue
        apart = abs(run['loss'] - runs['ours']['loss'])
        assert apart < tolerance[key[0]], f'{name} computes something else at {key}: {run["loss"]}'
    return runs


def ratios(runs, other):
    "Of another's time and memory to ours."
    ours, its = runs.get('ours', {}), runs.get(other, {})
    if 'ms' not in ours or 'ms' not in its: return {}
    return {f'ratio_time_{other}': round(its['ms']/ours['ms'], 2),
            f'ratio_memory_{other}': round(its['memory_mb']/max(ours['memory_mb'], .01), 2)}


def report_of(found, kind, n, a):
    "What is known of one size."
    runs = at_size(found, (kind, n))
    rate = max((one['flops'] for one in found.get('peak', {}).get((kind, a.n[0]), [])), default=None)
    for name, run in runs.items():
        if not rate or 'ms' not in run or name == 'metrics': continue
        needed = 2*2*(2*n)**2*a.dim                      # similarities, and weights times rows
        run['share_of_peak'] = round(needed/(run['ms']/1e3)/rate, 4)
    report = dict(n=n, rows=2*n, dim=a.dim, tau=a.tau, dtype=kind, device=a.device, threads=a.threads,
                  torch=next(iter(found['ours'].values()))[0].get('torch'), rounds=a.rounds,
                  reps=a.reps or default_reps(n), peak_tflops=rate and round(rate/1e12, 6), runs=runs)
    for other in ('lightly', 'plain', 'compiled', 'metrics'): report |= ratios(runs, other)
    if 'ms' in runs.get('floor', {}): report['time_over_floor'] = round(runs['ours']['ms']/runs['floor']['ms'], 2)
    return report


def words(text): return text.split(',')
def numbers(text): return [int(word) for word in text.split(',')]


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--n', type=numbers, default=[4096], help='images; the loss has 2n rows; several with commas')
    ask.add_argument('--rows', type=numbers, help='instead of --n, its rows; several with commas: 4096,16384,65536')
    ask.add_argument('--dim', type=int, default=128)
    ask.add_argument('--tau', type=float, default=.1)
    ask.add_argument('--dtype', type=words, default=['fp32'],
                     help='fp32, bf16 (rows in bfloat16, under autocast), or fp32,bf16')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    ask.add_argument('--threads', type=int, default=cores)
    ask.add_argument('--device', default='cpu', help='cpu or cuda')
    ask.add_argument('--rounds', type=int, default=3, help='processes for each contestant, in turns')
    ask.add_argument('--reps', type=int, help='timed steps in each process; default: fewer for large n')
    ask.add_argument('--seconds', type=float, default=1e6, help='what is not measured by then is left out')
    ask.add_argument('--contestants', type=words, help='only these, with commas')
    ask.add_argument('--together', action='store_true', help='all sizes in one process, on a CPU too: the memory of '
                     'all but the first is then too low')
    ask.add_argument('--only', choices=[*contestants, 'peak'], help='measure one contestant in this process')
    a = ask.parse_args()
    if unknown := set(a.dtype) - set(tolerance): ask.error(f'--dtype is fp32, bf16 or both, not {unknown.pop()}')
    if a.rows and any(rows % 2 or rows < 4 for rows in a.rows): ask.error('rows come in pairs: even numbers from 4 on')
    if a.rows: a.n = [rows//2 for rows in a.rows]
    if a.only: return measure_all(a.only, a)
    a.end = time.monotonic() + a.seconds
    names = a.contestants or ['ours', 'floor', 'plain', 'metrics', 'lightly', 'pml', 'compiled']
    if unknown := set(names) - set(contestants): ask.error(f'there is no contestant {unknown.pop()}')
    names = ['ours', 'peak', *(name for name in names if name != 'ours')]
    left_out = {name: why for name in names if (why := missing(name, a.device))}
    found, failed = compare([name for name in names if name not in left_out and name != 'pml'], a)
    if 'ours' not in found: sys.exit(f'ours failed: {failed.get("ours")}')
    reports = [report_of(found, kind, n, a) for kind in a.dtype for n in a.n]
    if len(reports) == 1 and not a.rows: result = reports[0]
    else: result = dict(device=a.device, torch=reports[0]['torch'], threads=a.threads, sizes=reports)
    if 'pml' in names and 'pml' not in left_out and not a.rows:
        few = argparse.Namespace(**vars(a) | dict(n=[min(a.n[0], PML_N)], reps=5, rounds=1, dtype=['fp32']))
        small, wrong = compare(('ours', 'pml'), few)
        failed |= wrong
        result['at_the_size_of_pml'] = at_size(small, ('fp32', few.n[0]))
        result |= ratios(result['at_the_size_of_pml'], 'pml')
    left_out |= {name: why for name, why in failed.items() if why == out_of_time}
    failed = {name: why for name, why in failed.items() if why != out_of_time}
    print(json.dumps(result | dict(left_out=left_out, failed=failed), indent=1))
    if failed: sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__': main()
