"Every logistic regression reaches its optimum."
import pytest, torch, torch.nn.functional as F

from simclr_nb.features import logistic
from simclr_nb.features.logistic import _loss_grad, l2_grid, logistic_path


def newton(h, y, lam, w):
    "The optimum by damped Newton's method with the whole Hessian, in double precision; and the loss as a function."
    n, d, C = len(h), h.shape[1], int(y.max()) + 1
    x = torch.cat([h.double(), torch.ones(n, 1, dtype=torch.float64)], 1)
    pull = torch.full((d + 1, 1), lam, dtype=torch.float64)
    pull[-1] = 0
    def loss(v): return w @ F.cross_entropy(x @ v, y, reduction='none') + (pull*v*v).sum()/2
    v = torch.zeros(d + 1, C, dtype=torch.float64)
    for _ in range(100):
        p, f = (x @ v).softmax(1), loss(v)
        g = x.T @ (w[:, None]*(p - F.one_hot(y))) + pull*v
        H = torch.diag((pull + torch.zeros_like(v)).flatten()).view(d + 1, C, d + 1, C)
        for a in range(C):
            for b in range(C): H[:, a, :, b] += x.T @ ((w*p[:, a]*(float(a == b) - p[:, b]))[:, None]*x)
        step = -(torch.linalg.pinv(H.view(v.numel(), -1), rtol=1e-14, hermitian=True) @ g.flatten()).view_as(v)
        left, t = -float((g*step).sum())/2, 1.
        if left < 1e-9*f: return float(f), lambda W, b: float(loss(torch.cat([W, b[None]]).double()))
        while loss(v + t*step) > f - 1e-4*t*left and t > 1e-9: t /= 2
        v = v + t*step
    raise AssertionError(f'Newton has not arrived: {left/f}')


def problem(kind):
    g = torch.Generator().manual_seed(1)
    y = torch.arange(400) % 4
    apart = dict(separable=2., wide=.3).get(kind, .15)
    h = torch.randn(400, 30, generator=g) + torch.randn(4, 30, generator=g)[y]*apart
    if kind == 'wide': h = torch.cat([h[:60], torch.randn(60, 50, generator=g)], 1)       # more features than images
    if kind == 'dead': h = torch.cat([h.relu(), torch.zeros(400, 10), h[:, :5]], 1)   # constant features, and copies
    if kind == 'spread': h = h*torch.logspace(-2, 2, 30)
    return h, y[:len(h)]


@pytest.mark.parametrize('kind', ['overlapping', 'separable', 'wide', 'dead', 'spread'])
@pytest.mark.parametrize('weighted', [False, True])
def test_every_penalty_reaches_its_optimum(kind, weighted):
    h, y = problem(kind)
    weight = torch.linspace(.1 if weighted else 1, 2 if weighted else 1, len(h), dtype=torch.float64)
    path = logistic_path(h, y, [1e-6, 1e-3, 1., 1e5], weight)
    for W, b, lam in zip(path.weights, path.bias, path.l2.tolist()):
        best, loss = newton(h, y, lam, weight/weight.sum())
        assert -1e-7 < loss(W, b)/best - 1 < 1e-5, (lam, loss(W, b)/best - 1)


def test_single_precision_features_give_the_same_classifiers():
    h, y = problem('separable')
    a, b = logistic_path(h, y), logistic_path(h.double(), y)
    assert a.weights.dtype == torch.float32 and b.weights.dtype == torch.float64
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-5, atol=0)
    assert float(b.losses.min()) < 1e-4                     # so small that 1 - p is lost in single precision
    single, double = (h @ a.weights + a.bias[:, None]).argmax(2), (h.double() @ b.weights + b.bias[:, None]).argmax(2)
    assert (single == double).float().mean() > .999


def test_gradient_and_curvature_are_those_of_autograd():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 7, generator=g, dtype=torch.float64), torch.arange(50) % 3
    x[:, -1] = 1
    w, lam = torch.rand(50, generator=g, dtype=torch.float64), torch.tensor([.1, 2.], dtype=torch.float64)
    W = torch.randn(2, 3, 7, generator=g, dtype=torch.float64).requires_grad_()
    def loss(V, lam):
        return w @ F.cross_entropy(x @ V.T, y, reduction='none') + lam/2*V[:, :-1].square().sum()
    f = torch.stack([loss(V, one) for V, one in zip(W, lam)])
    p = (x @ W.mT).softmax(2).detach()
    wanted = f.detach(), torch.autograd.grad(f.sum(), W)[0], w @ (p*(1 - p))
    for ours, want in zip(_loss_grad(x, y, w, W.detach(), lam, W.dtype), wanted): torch.testing.assert_close(ours, want)


@pytest.mark.parametrize('kind', ['overlapping', 'wide', 'dead', 'spread'])
def test_the_choice_of_a_penalty_does_not_need_double_precision(kind):
    h, y = problem(kind)
    some = dict(tol=1e-6, max_iter=200)
    a, b = logistic_path(h, y, **some), logistic_path(h.double(), y, **some)
    new = h + torch.randn(h.shape, generator=torch.Generator().manual_seed(2))*h.std(0)
    single, double = (new.to(p.weights) @ p.weights + p.bias[:, None] for p in (a, b))
    assert (single.argmax(2) == double.argmax(2)).float().mean() > .998


@pytest.mark.parametrize('n', [16, 80, 400])
def test_rounding_takes_no_evaluations(monkeypatch, n):
    "In single precision a line search among equal losses has no end: 2,140 and 1,394 evaluations of the first two."
    seen = []
    def counted(*args):
        seen.append(args[3].shape)
        return _loss_grad(*args)
    monkeypatch.setattr(logistic, '_loss_grad', counted)
    y = torch.arange(n) % 2
    g = torch.Generator().manual_seed(0)
    h = torch.randn(n, 432, generator=g).abs() + .5*torch.randn(2, 432, generator=g)[y]     # can be separated
    path = logistic_path(h, y, l2_grid, tol=1e-6, max_iter=200)
    assert len(seen) < 150, len(seen)
    assert ((h @ path.weights[0] + path.bias[0]).argmax(1) == y).all()
