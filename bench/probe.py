"""Evaluation beside other libraries: 45 logistic regressions beside scikit-learn's, nearest neighbors beside lightly's;
and all of `simclr evaluate` beside its encoders alone.

    python bench/probe.py                          # CIFAR-10 if it is there, else crops of solar cells
    python bench/probe.py --data solar_cells --parts logistic
    python bench/probe.py --parts evaluate --arch resnet50

Features of real images, from a ResNet-18 that has not been trained; kept in the system's temporary folder for the next
run. Prints JSON.
"""
import argparse, hashlib, json, os, statistics, subprocess, sys, tempfile, time, warnings
from pathlib import Path
warnings.simplefilter('ignore', FutureWarning)


def cpus(): return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def best_source():
    from fastai.data.external import fastai_path
    return 'cifar10' if (fastai_path('data')/'cifar10').is_dir() else 'solar_cells'


def cache_file(*facts):
    user = os.getuid() if hasattr(os, 'getuid') else 0
    name = hashlib.blake2b(repr(facts).encode(), digest_size=6).hexdigest()
    return Path(tempfile.gettempdir())/f'simclr_nb_probe_{user}'/f'{name}.pt'


def real_features(source, n, m):
    "Features (n, 512) and classes of training images, and of m test images."
    import numpy as np, torch
    from simclr_nb.data.sources import train_test_splits
    from simclr_nb.encoder import build_encoder
    from simclr_nb.features.extract import extract_features
    file = cache_file(source, n, m, torch.__version__)
    if file.exists(): return torch.load(file)
    torch.manual_seed(0)
    encoder, rng = build_encoder('resnet18', 32, 'imagenet'), np.random.default_rng(0)
    got = []
    for images, k in zip(train_test_splits(source), (n, m)):
        some = images.subset(rng.permutation(len(images))[:k].tolist())
        h, i = extract_features(encoder, some, 32)
        got += [h, torch.as_tensor(some.labels[i.numpy()])]
    file.parent.mkdir(exist_ok=True)
    torch.save(got, file)
    return got


def newton(h, y, lam, tol=1e-12):
    """The optimum for one penalty, by code that shares nothing with the library: Newton's method in double precision,
    each step by conjugate gradients. W, b, loss, what is left."""
    import torch
    n, C, lam = len(h), int(y.max()) + 1, float(lam)
    e, V = torch.linalg.eigh(torch.cov(h.T, correction=0))
    x, Y = torch.cat([(h - h.mean(0)) @ V, h.new_ones(n, 1)], 1), torch.nn.functional.one_hot(y, C).double()
    pull = torch.cat([torch.full_like(e, lam), e.new_zeros(1)])[:, None]
    P, W = torch.cat([e.clamp(min=0), e.new_ones(1)])[:, None]/4 + pull, h.new_zeros(h.shape[1] + 1, C)
    def loss(W): return float(-((x @ W).log_softmax(1)*Y).sum()/n + (pull*W*W).sum()/2)
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


def by_sklearn(h, y, lam, max_iter):
    "Weights, bias, seconds, steps."
    import torch
    from sklearn.linear_model import LogisticRegression
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = LogisticRegression(C=1/(lam*len(h)), max_iter=max_iter).fit(h, y)
    took = time.perf_counter() - start
    return torch.from_numpy(m.coef_.T).double(), torch.from_numpy(m.intercept_).double(), took, int(m.n_iter_.max())


def prepare(args):
    import torch
    from threadpoolctl import threadpool_limits
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)                                                    # scikit-learn's
    h, y, h_test, _ = real_features(args.data, args.n, args.queries)
    if args.standardize:
        mean, sd = h.mean(0), h.std(0).clamp(min=1e-6)
        h, h_test = (h - mean)/sd, (h_test - mean)/sd
    return h, y, h_test


def solved(h, y, device):
    "Our solutions, and the seconds they took."
    from simclr_nb.features.logistic import logistic_path
    logistic_path(h[:500], y[:500] % int(y[:500].max() + 1), [1.])                     # libraries load, threads start
    start = time.perf_counter()
    path = logistic_path(h.to(device), y)
    return path, time.perf_counter() - start


def logistic(args):
    import numpy as np, torch
    h, y, h_test = prepare(args)
    path, ours = solved(h, y, args.device)
    X, T = h.double(), h_test.double()
    def objective(W, b, lam): return float(torch.nn.functional.cross_entropy(X @ W + b, y) + lam/2*W.square().sum())
    def apart(W, b, A, a): return float(((T @ W + b).argmax(1) != (T @ A + a).argmax(1)).double().mean())
    rows, exact = [], {int(i) for i in np.linspace(0, 44, args.exact)}
    for i, (W, b, _, lam) in enumerate(zip(*path)):
        W, b, lam = W.cpu().double(), b.cpu().double(), float(lam)
        A, a, seconds, steps = by_sklearn(h.numpy(), y.numpy(), lam, args.max_iter)
        row = dict(l2=lam, ours=objective(W, b, lam), sklearn=objective(A, a, lam), seconds=seconds, steps=steps,
                   apart=apart(W, b, A, a))
        if i in exact:
            A, a, f, left = newton(X, y, lam)
            row |= dict(optimum=f, optimum_left=left/f, apart_optimum=apart(W, b, A, a))
        rows.append(row)
        print(f'{i + 1} of {len(path.l2)}: {json.dumps(row)}', file=sys.stderr, flush=True)
    facts = dict(data=args.data, images=len(h), features=h.shape[1], classes=int(y.max()) + 1)
    return facts | summary(rows, ours, args)


def summary(rows, ours, args):
    import sklearn
    known, total = [r for r in rows if 'optimum' in r], sum(r['seconds'] for r in rows)
    def most(f, rs=rows): return max(map(f, rs), default=None)
    return dict(
        penalties=len(rows), threads=args.threads, device=args.device, standardized=args.standardize,
        sklearn_version=sklearn.__version__, ours_seconds=round(ours, 2), sklearn_seconds=round(total, 2),
        ratio_time_sklearn=round(total/ours, 2), sklearn_stopped_early=sum(r['steps'] >= args.max_iter for r in rows),
        loss_above_sklearn_max=most(lambda r: r['ours']/r['sklearn'] - 1),
        sklearn_loss_above_ours_max=most(lambda r: r['sklearn']/r['ours'] - 1),
        predictions_apart_sklearn_max=most(lambda r: r['apart']),
        optimum_known_at=len(known), optimum_left_max=most(lambda r: r['optimum_left'], known),
        loss_above_optimum_max=most(lambda r: r['ours']/r['optimum'] - 1, known),
        predictions_apart_optimum_max=most(lambda r: r['apart_optimum'], known),
        sklearn_loss_above_optimum_max=most(lambda r: r['sklearn']/r['optimum'] - 1, known),
        rows=rows if args.rows else None)


def predictor(name, bank, labels, args):
    "A function of queries to predictions."
    import torch, torch.nn.functional as F
    if name == 'lightly':
        from lightly.utils.benchmarking.knn import knn_predict
        bank = F.normalize(bank, dim=1).T.contiguous()
        return lambda q: torch.cat([knn_predict(b, bank, labels, 10, args.k, .1)[:, 0] for b in q.split(1024)])
    from simclr_nb.features.neighbors import NeighborClassifier
    return NeighborClassifier(args.k, .1).fit(bank, labels).predict


def neighbors(name, args):
    "One contestant in this process: seconds and peak of extra memory."
    sys.path.insert(0, str(Path(__file__).parent))
    import torch, torch.nn.functional as F
    from loss import reset_peak
    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(args.bank, args.dim, generator=g), torch.randn(args.queries, args.dim, generator=g)
    labels = torch.randint(0, 10, (args.bank,), generator=g)
    if name == 'lightly': queries = F.normalize(queries, dim=1)                        # not timed: a gift to lightly
    run = predictor(name, bank, labels, args)
    del bank
    run(queries[:64])
    before, peak = reset_peak()
    start = time.perf_counter()
    got = run(queries)
    took = time.perf_counter() - start
    return dict(seconds=took, extra_mb=(peak() - before)/1e6, predictions=got.tolist())


def in_a_process(name, args):
    numbers = {f'--{k}': getattr(args, k) for k in ('bank', 'queries', 'dim', 'k', 'threads')}
    command = [sys.executable, __file__, '--only', name, *(str(c) for pair in numbers.items() for c in pair)]
    env = os.environ | dict(OMP_NUM_THREADS=str(args.threads))
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode: sys.exit(f'{name} failed:\n{done.stderr}')
    return json.loads(done.stdout.splitlines()[-1])


def knn(args):
    found = {'ours': [], 'lightly': []}
    for _ in range(args.rounds):                               # in turns, so that a busy moment hits both
        for name, runs in found.items(): runs.append(in_a_process(name, args))
    a, b = (found[n][0]['predictions'] for n in ('ours', 'lightly'))
    middle = {n: statistics.median(r['seconds'] for r in runs) for n, runs in found.items()}
    extra = {n: max(r['extra_mb'] for r in runs) for n, runs in found.items()}
    settings = {k: getattr(args, k) for k in ('bank', 'queries', 'dim', 'k', 'threads', 'rounds')}
    seconds = {f'{n}_seconds': round(v, 2) for n, v in middle.items()}
    memory = {f'{n}_extra_mb': round(v) for n, v in extra.items()}
    return settings | dict(predictions_apart=sum(p != q for p, q in zip(a, b))/len(a)) | seconds | memory | dict(
        ratio_time_lightly=round(middle['lightly']/middle['ours'], 2))


def linked(images, folder, n):
    "n images of a set as links, in a folder for each class."
    import numpy as np
    for i in np.random.default_rng(0).permutation(len(images))[:n]:
        place = folder/images.classes[images.labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        (place/f'{i}{images.files[i].suffix}').symlink_to(images.files[i].resolve())


def bare(encoders, x):
    "Seconds for all images, which are in memory as they come from the loader."
    import torch
    start = time.perf_counter()
    with torch.no_grad():
        for encoder in encoders:
            for batch in x.split(256): encoder(batch/255)
    return time.perf_counter() - start


def evaluation(args):
    "The command on n images, 4/5 of them for training, beside its two networks on the same images in memory."
    import torch
    from simclr_nb.data.datasets import eval_loader
    from simclr_nb.data.sources import train_test_splits
    from simclr_nb.data.sets import folder_images
    from simclr_nb.encoder import build_encoder, save_encoder
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for part, images, n in zip(('train', 'test'), train_test_splits(args.data), (4*args.n//5, args.n//5)):
            linked(images, d/'images'/part, n)
        encoders = [build_encoder(args.arch, 32).eval() for _ in range(2)]
        save_encoder(encoders[0], d/'run/encoder.safetensors')
        loader = [eval_loader(folder_images(d/'images'/part), 32) for part in ('train', 'test')]
        x = torch.cat([batch for part in loader for batch, _ in part])
        first = bare(encoders, x)
        command = ['-m', 'simclr_nb', 'evaluate', d/'run/encoder.safetensors', d/'images', '--out', d/'report']
        env = os.environ | dict(OMP_NUM_THREADS=str(args.threads))
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)
        took = time.perf_counter() - start
        if done.returncode: sys.exit(f'simclr evaluate failed:\n{done.stderr}')
        alone = statistics.mean([first, bare(encoders, x)])                # before and after, for a busy moment
    return dict(data=args.data, images=len(x), arch=args.arch, threads=args.threads, seconds=round(took, 1),
                images_per_second=round(len(x)/took, 1), encoders_alone_seconds=round(alone, 1),
                ratio_encoders_alone=round(alone/took, 2))


parts = dict(logistic=logistic, knn=knn, evaluate=evaluation)


def arguments():
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument('--data', help='labeled images; default: cifar10 if it is there, else solar_cells')
    ask.add_argument('--n', type=int, default=10_000, help='training images for logistic regression')
    ask.add_argument('--standardize', action='store_true', help='features of variance 1: a harder problem')
    ask.add_argument('--exact', type=int, default=8, help='penalties at which Newton finds the optimum')
    ask.add_argument('--max-iter', type=int, default=1000, help="scikit-learn's limit of steps (its own is 100)")
    ask.add_argument('--rows', action='store_true', help='print the losses at every penalty')
    ask.add_argument('--device', default='cpu', help='of our solver; scikit-learn has the CPU')
    ask.add_argument('--bank', type=int, default=50_000)
    ask.add_argument('--queries', type=int, default=10_000)
    ask.add_argument('--dim', type=int, default=512)
    ask.add_argument('--k', type=int, default=200, help='neighbors; 200 is what lightly takes')
    ask.add_argument('--rounds', type=int, default=3, help='processes for each contestant, in turns, for the medians')
    ask.add_argument('--threads', type=int, default=cpus())
    ask.add_argument('--arch', default='resnet18', help='network of the whole evaluation, at 32 pixels')
    ask.add_argument('--parts', type=lambda text: text.split(','), default=list(parts),
                     help='which: ' + ', '.join(parts))
    ask.add_argument('--only', choices=('ours', 'lightly'), help=argparse.SUPPRESS)
    return ask.parse_args()


if __name__ == '__main__':
    args = arguments()
    if args.only:
        print(json.dumps(neighbors(args.only, args)))
        sys.exit()
    args.data = args.data or best_source()
    print(json.dumps({name: parts[name](args) for name in args.parts}, indent=1))
