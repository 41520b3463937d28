"""Evaluation beside other libraries: 45 logistic regressions beside scikit-learn's, nearest neighbours beside lightly's. Prints JSON.

    python bench/probe.py                          # CIFAR-10 if it is there, else crops of solar cells
    python bench/probe.py --data solar_cells --skip knn

Features of real images, from a ResNet-18 that has not been trained; kept in the system's temporary folder for the next run.
"""
import argparse, hashlib, json, os, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path
warnings.simplefilter('ignore', FutureWarning)


def cpus(): return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def best_source():
    from fastai.data.external import fastai_path
    return 'cifar10' if (fastai_path('data')/'cifar10').is_dir() else 'solar_cells'


def real_features(source, n, m):
    "Features (n, 512) and classes of training images, and of m test images."
    import numpy as np, torch
    from simclr_nb.data import train_test_splits
    from simclr_nb.encoder import build_encoder
    from simclr_nb.features import extract_features
    place = Path(tempfile.gettempdir())/f'simclr_nb_probe_{os.getuid() if hasattr(os, "getuid") else 0}'
    file = place/f'{hashlib.blake2b(repr((source, n, m, torch.__version__)).encode(), digest_size=6).hexdigest()}.pt'
    if file.exists(): return torch.load(file)
    torch.manual_seed(0)
    encoder, rng = build_encoder('resnet18', 32, 'imagenet'), np.random.default_rng(0)
    parts = [s.subset(rng.permutation(len(s))[:k].tolist()) for s, k in zip(train_test_splits(source), (n, m))]
    got = []
    for s in parts:
        h, i = extract_features(encoder, s, 32)
        got += [h, torch.as_tensor(s.labels[i.numpy()])]
    place.mkdir(exist_ok=True)
    torch.save(got, file)
    return got


def newton(h, y, lam, tol=1e-12):
    "The optimum for one penalty, and shares nothing with the library: Newton's method in double precision, each step by conjugate gradients. W, b, loss, what is left."
    import torch
    n, C, lam = len(h), int(y.max()) + 1, float(lam)
    e, V = torch.linalg.eigh(torch.cov(h.T, correction=0))
    x, Y = torch.cat([(h - h.mean(0)) @ V, h.new_ones(n, 1)], 1), torch.nn.functional.one_hot(y, C).double()
    pull = torch.cat([torch.full_like(e, lam), e.new_zeros(1)])[:, None]
    P, W = torch.cat([e.clamp(min=0), e.new_ones(1)])[:, None]/4 + pull, h.new_zeros(h.shape[1] + 1, C)
    loss = lambda W: float(-((x @ W).log_softmax(1)*Y).sum()/n + (pull*W*W).sum()/2)
    for _ in range(100):
        p = (x @ W).softmax(1)
        r, d = -(x.T @ (p - Y)/n + pull*W), torch.zeros_like(W)
        s = r/P
        rz = first = (r*s).sum()
        for _ in range(2000):
            q = p*(x @ s)
            Hs = x.T @ (q - p*q.sum(1, keepdim=True))/n + pull*s
            a = rz/(s*Hs).sum()
            d, r = d + a*s, r - a*Hs
            rz, old = (r*r/P).sum(), rz
            if rz < 1e-6*first: break
            s = r/P + rz/old*s
        left, t, f = float((d*((x.T @ (Y - p)/n) - pull*W)).sum()/2), 1., loss(W)
        if left <= tol*f: break
        while loss(W + t*d) > f - 1e-4*t*left and t > 1e-6: t /= 2
        W = W + t*d
    A = V @ W[:-1]
    return A, W[-1] - h.mean(0) @ A, f, left


def logistic(args):
    import numpy as np, sklearn, torch
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits
    from simclr_nb.logistic import logistic_path
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)                                                    # scikit-learn's
    h, y, ht, yt = real_features(args.data, args.n, args.queries)
    if args.standardise: mean, sd = h.mean(0), h.std(0).clamp(min=1e-6); h, ht = (h - mean)/sd, (ht - mean)/sd
    logistic_path(h[:500], y[:500] % int(y[:500].max() + 1), [1.])                     # libraries load, threads start
    start = time.perf_counter()
    path = logistic_path(h.to(args.device), y)
    ours = time.perf_counter() - start
    X, Y, X64, T64 = h.numpy(), y.numpy(), h.double(), ht.double()
    guess = lambda W, b: (T64 @ W + b).argmax(1)
    apart = lambda a, b: float((a != b).double().mean())
    objective = lambda W, b, lam: float(torch.nn.functional.cross_entropy(X64 @ W + b, y) + lam/2*W.square().sum())
    rows, exact = [], {int(i) for i in np.linspace(0, 44, args.exact)}
    for i, (W, b, lam) in enumerate(zip(path.weights.cpu().double(), path.bias.cpu().double(), path.strengths.tolist())):
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            m = LogisticRegression(C=1/(lam*len(X)), max_iter=args.max_iter).fit(X, Y)
        took = time.perf_counter() - start
        A, a = torch.from_numpy(m.coef_.T).double(), torch.from_numpy(m.intercept_).double()
        row = dict(penalty=lam, ours=objective(W, b, lam), sklearn=objective(A, a, lam), seconds=took, steps=int(m.n_iter_.max()), apart=apart(guess(W, b), guess(A, a)))
        if i in exact:
            A, a, f, left = newton(X64, y, lam)
            row |= dict(optimum=f, optimum_left=left/f, apart_optimum=apart(guess(W, b), guess(A, a)))
        rows.append(row)
        print(f'{i + 1} of {len(path.strengths)}: {json.dumps(row)}', file=sys.stderr, flush=True)
    known, total = [r for r in rows if 'optimum' in r], sum(r['seconds'] for r in rows)
    most = lambda f, rs=rows: max((f(r) for r in rs), default=None)
    return dict(data=args.data, images=len(h), features=h.shape[1], classes=int(y.max()) + 1, strengths=len(rows), threads=args.threads, device=args.device, standardised=args.standardise,
        sklearn_version=sklearn.__version__, ours_seconds=round(ours, 2), sklearn_seconds=round(total, 2), ratio_time_sklearn=round(total/ours, 2),
        sklearn_stopped_early=sum(r['steps'] >= args.max_iter for r in rows),
        loss_above_sklearn_max=most(lambda r: r['ours']/r['sklearn'] - 1), sklearn_loss_above_ours_max=most(lambda r: r['sklearn']/r['ours'] - 1), predictions_apart_sklearn_max=most(lambda r: r['apart']),
        optimum_known_at=len(known), optimum_left_max=most(lambda r: r['optimum_left'], known),
        loss_above_optimum_max=most(lambda r: r['ours']/r['optimum'] - 1, known), predictions_apart_optimum_max=most(lambda r: r['apart_optimum'], known),
        sklearn_loss_above_optimum_max=most(lambda r: r['sklearn']/r['optimum'] - 1, known), rows=rows if args.rows else None)


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
        from simclr_nb.features import knn_predict
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
    middle = {n: statistics.median(r['seconds'] for r in runs) for n, runs in found.items()}
    return dict(bank=args.bank, queries=args.queries, dim=args.dim, k=args.k, threads=args.threads, rounds=args.rounds, answers_apart=sum(p != q for p, q in zip(a, b))/len(a),
        **{f'{n}_seconds': round(v, 2) for n, v in middle.items()}, **{f'{n}_extra_mb': round(max(r['extra_mb'] for r in runs)) for n, runs in found.items()},
        ratio_time_lightly=round(middle['lightly']/middle['ours'], 2))


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--data', help='labelled images; default: cifar10 if it is there, else solar_cells')
    ask.add_argument('--n', type=int, default=10_000, help='training images for logistic regression')
    ask.add_argument('--standardise', action='store_true', help='features of variance 1: a harder problem')
    ask.add_argument('--exact', type=int, default=8, help='strengths at which the optimum is found by Newton in double precision')
    ask.add_argument('--max-iter', type=int, default=1000, help="scikit-learn's limit of steps; its default, 100, is too few for weak penalties")
    ask.add_argument('--rows', action='store_true', help='print the losses at every strength')
    ask.add_argument('--device', default='cpu', help='of our solver; scikit-learn has the CPU')
    ask.add_argument('--bank', type=int, default=50_000)
    ask.add_argument('--queries', type=int, default=10_000)
    ask.add_argument('--dim', type=int, default=512)
    ask.add_argument('--k', type=int, default=200, help='neighbours; 200 is what lightly takes')
    ask.add_argument('--rounds', type=int, default=3, help='processes for each contestant, in turns; the medians are compared')
    ask.add_argument('--threads', type=int, default=cpus())
    ask.add_argument('--skip', choices=('knn', 'logistic'), help='leave out one half')
    ask.add_argument('--only', choices=('ours', 'lightly'), help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.only:
        print(json.dumps(neighbours(args.only, args)))
        sys.exit()
    args.data = args.data or best_source()
    print(json.dumps({name: run(args) for name, run in dict(logistic=logistic, knn=knn).items() if name != args.skip}, indent=1))
