"""Evaluation beside other libraries: 45 logistic regressions beside scikit-learn's, nearest neighbours beside lightly's. Prints JSON.

    python bench/probe.py                          # CIFAR-10 if it is there, else crops of solar cells
    python bench/probe.py --data solar_cells --skip knn

Features of real images, from a ResNet-18 that has not been trained; kept in the system's temporary folder for the next run.
"""
import argparse, hashlib, json, os, subprocess, sys, tempfile, time, warnings
from pathlib import Path
warnings.simplefilter('ignore', FutureWarning)


def cpus(): return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def best_source():
    from fastai.data.external import fastai_path
    return 'cifar10' if (fastai_path('data')/'cifar10').is_dir() else 'solar_cells'


def real_features(source, n, m):
    "Features (n, 512) and classes of training images, and of m test images."
    import numpy as np, torch
    from simclr_nb.data import train_test
    from simclr_nb.encoder import build_encoder
    from simclr_nb.evaluation import embed
    place = Path(tempfile.gettempdir())/f'simclr_nb_probe_{os.getuid() if hasattr(os, "getuid") else 0}'
    file = place/f'{hashlib.blake2b(repr((source, n, m, torch.__version__)).encode(), digest_size=6).hexdigest()}.pt'
    if file.exists(): return torch.load(file)
    torch.manual_seed(0)
    encoder, rng = build_encoder('resnet18', 32, 'imagenet'), np.random.default_rng(0)
    parts = [s.subset(rng.permutation(len(s))[:k].tolist()) for s, k in zip(train_test(source), (n, m))]
    got = []
    for s in parts:
        h, i = embed(encoder, s, 32)
        got += [h, torch.as_tensor(s.labels[i.numpy()])]
    place.mkdir(exist_ok=True)
    torch.save(got, file)
    return got


def logistic(args):
    import numpy as np, sklearn, torch
    from sklearn.linear_model import LogisticRegression
    from simclr_nb.evaluation import logistic_path, penalties
    torch.set_num_threads(args.threads)
    h, y, ht, yt = real_features(args.data, args.n, args.queries)
    if args.standardise: mean, sd = h.mean(0), h.std(0).clamp(min=1e-6); h, ht = (h - mean)/sd, (ht - mean)/sd
    logistic_path(h[:500], y[:500] % int(y[:500].max() + 1), [1.])                     # libraries load, threads start
    start = time.perf_counter()
    path = logistic_path(h.to(args.device), y)
    ours = time.perf_counter() - start
    X, Y, X64, T64 = h.numpy(), y.numpy(), h.double(), ht.double()

    def objective(W, b, lam): return float(torch.nn.functional.cross_entropy(X64 @ W + b, y) + lam/2*W.square().sum())

    def sklearns(lam, **kwargs):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            m = LogisticRegression(C=1/(lam*len(X)), max_iter=100_000, **kwargs).fit(X.astype(kwargs.pop('dtype', X.dtype)), Y)
        took = time.perf_counter() - start
        W, b = torch.from_numpy(m.coef_.T).double(), torch.from_numpy(m.intercept_).double()
        return took, objective(W, b, lam), (T64 @ W + b).argmax(1)

    rows, exact = [], {int(i) for i in np.linspace(0, 44, args.exact)}
    for i, (W, b, lam) in enumerate(zip(path.weights.cpu().double(), path.bias.cpu().double(), path.strengths.tolist())):
        took, theirs, guess = sklearns(lam)
        row = dict(penalty=lam, ours=objective(W, b, lam), sklearn=theirs, seconds=took, apart=float(((T64 @ W + b).argmax(1) != guess).double().mean()))
        if i in exact:                                                                 # the optimum: Newton's method in double precision
            m = LogisticRegression(C=1/(lam*len(X)), max_iter=200, tol=1e-8, solver='newton-cg').fit(X64.numpy(), Y)
            W2, b2 = torch.from_numpy(m.coef_.T), torch.from_numpy(m.intercept_)
            row |= dict(optimum=objective(W2, b2, lam), apart_optimum=float(((T64 @ W + b).argmax(1) != (T64 @ W2 + b2).argmax(1)).double().mean()))
        rows.append(row)
    gain = [(r['ours'] - r['sklearn'])/r['sklearn'] for r in rows]
    known = [r for r in rows if 'optimum' in r]
    total = sum(r['seconds'] for r in rows)
    return dict(data=args.data, images=len(h), features=h.shape[1], classes=int(y.max()) + 1, strengths=len(rows), threads=args.threads, device=args.device, standardised=args.standardise,
        sklearn_version=sklearn.__version__, ours_seconds=round(ours, 2), sklearn_seconds=round(total, 2), ratio_time_sklearn=round(total/ours, 2),
        loss_above_sklearn_max=max(gain), loss_below_sklearn_max=-min(gain), predictions_apart_sklearn_max=max(r['apart'] for r in rows),
        loss_apart_optimum_max=max((abs(r['ours']/r['optimum'] - 1) for r in known), default=None),
        sklearn_apart_optimum_max=max((abs(r['sklearn']/r['optimum'] - 1) for r in known), default=None),
        predictions_apart_optimum_max=max((r['apart_optimum'] for r in known), default=None), optimum_known_at=len(known), rows=rows if args.rows else None)


def neighbours(name, args):
    "One contestant in this process: seconds and peak of extra memory."
    sys.path.insert(0, str(Path(__file__).parent))
    import torch, torch.nn.functional as F
    from loss import reset_peak
    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(args.bank, args.dim, generator=g), torch.randn(args.queries, args.dim, generator=g)
    labels = torch.randint(0, 10, (args.bank,), generator=g)
    if name == 'lightly':
        from lightly.utils.benchmarking.knn import knn_predict
        bank, queries = F.normalize(bank, dim=1).T.contiguous(), F.normalize(queries, dim=1)       # not timed: a gift to lightly
        run = lambda q: torch.cat([knn_predict(b, bank, labels, 10, args.k, .1)[:, 0] for b in q.split(1024)])
    else:
        from simclr_nb.evaluation import knn_predict
        run = lambda q: knn_predict(bank, labels, q, args.k, .1)
    run(queries[:64])
    before, peak = reset_peak()
    start = time.perf_counter()
    got = run(queries)
    took = time.perf_counter() - start
    return dict(seconds=took, extra_mb=(peak() - before)/1e6, answers=got.tolist())


def knn(args):
    found = {'ours': [], 'lightly': []}
    for _ in range(args.rounds):                                                       # in turns, so that a busy moment hits both
        for name, runs in found.items():
            command = [sys.executable, __file__, '--only', name, '--bank', args.bank, '--queries', args.queries, '--dim', args.dim, '--k', args.k, '--threads', args.threads]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS=str(args.threads)))
            if done.returncode: sys.exit(f'{name} failed:\n{done.stderr}')
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    a, b = (found[n][0]['answers'] for n in ('ours', 'lightly'))
    best = {n: min(r['seconds'] for r in runs) for n, runs in found.items()}
    return dict(bank=args.bank, queries=args.queries, dim=args.dim, k=args.k, threads=args.threads, rounds=args.rounds, answers_apart=sum(p != q for p, q in zip(a, b))/len(a),
        **{f'{n}_seconds': round(v, 2) for n, v in best.items()}, **{f'{n}_extra_mb': round(max(r['extra_mb'] for r in runs)) for n, runs in found.items()},
        ratio_time_lightly=round(best['lightly']/best['ours'], 2))


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--data', help='labelled images; default: cifar10 if it is there, else solar_cells')
    ask.add_argument('--n', type=int, default=10_000, help='training images for logistic regression')
    ask.add_argument('--standardise', action='store_true', help='features of variance 1: a harder problem')
    ask.add_argument('--exact', type=int, default=6, help='strengths at which the optimum is found by Newton in double precision')
    ask.add_argument('--rows', action='store_true', help='print the losses at every strength')
    ask.add_argument('--device', default='cpu', help='of our solver; scikit-learn has the CPU')
    ask.add_argument('--bank', type=int, default=50_000)
    ask.add_argument('--queries', type=int, default=10_000)
    ask.add_argument('--dim', type=int, default=512)
    ask.add_argument('--k', type=int, default=200, help='neighbours; 200 is what lightly takes')
    ask.add_argument('--rounds', type=int, default=1, help='processes for each contestant, in turns')
    ask.add_argument('--threads', type=int, default=cpus())
    ask.add_argument('--skip', choices=('knn', 'logistic'), help='leave out one half')
    ask.add_argument('--only', choices=('ours', 'lightly'), help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.only:
        print(json.dumps(neighbours(args.only, args)))
        sys.exit()
    args.data = args.data or best_source()
    print(json.dumps({name: run(args) for name, run in dict(logistic=logistic, knn=knn).items() if name != args.skip}, indent=1))
