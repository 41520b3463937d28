"""One LARS step on the tensors of ResNet-50 with its head, beside lightly's LARS where it is installed: milliseconds
per step, as JSON."""
import argparse, json, statistics, time
from importlib.util import find_spec

import torch
from simclr_nb.encoder import build_encoder
from simclr_nb.lars import LARS, no_decay, param_groups
from simclr_nb.projection import projection_head
from torch import nn


def network(arch, device):
    "Encoder and head, with a gradient of plausible size on every tensor."
    encoder = build_encoder(arch)
    model = nn.Sequential(encoder, projection_head(encoder.num_features)).to(device)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters(): p.grad = .01*torch.randn(p.shape, generator=g).to(device)
    return model


def ours(model): return LARS(model, lr=.1, momentum=.9, weight_decay=1e-6)


def lightlys(model):
    "lightly leaves a group alone where its weight decay is 0."
    from lightly.utils.lars import LARS as LightlyLARS
    weights, rest = (g['params'] for g in param_groups(model))
    groups = [dict(params=weights), dict(params=rest, weight_decay=0.)]
    return LightlyLARS(groups, lr=.1, momentum=.9, weight_decay=1e-6)


def contestants(arch, device):
    "Each with a network of its own, all with the same numbers."
    torch.manual_seed(0)
    models = {'ours': network(arch, device)}
    if find_spec('lightly'):
        models['lightly'] = network(arch, device)
        models['lightly'].load_state_dict(models['ours'].state_dict())
    make = dict(ours=ours, lightly=lightlys)
    return {name: make[name](model) for name, model in models.items()}, models


def finish(device):
    if device.startswith('cuda'): torch.cuda.synchronize()


def milliseconds(optimizers, device, rounds, warm=3):
    "Medians of steps taken in turns, so that a busy moment of the machine hits all; the order turns too."
    times = {k: [] for k in optimizers}
    for i in range(warm + rounds):
        for k in list(optimizers)[::1 if i % 2 else -1]:
            finish(device)
            start = time.perf_counter()
            optimizers[k].step()
            finish(device)
            if i >= warm: times[k].append(1e3*(time.perf_counter() - start))
    return {k: round(statistics.median(v), 3) for k,v in times.items()}


def apart(models):
    "How far the weights of the two lie apart, by the norm of ours; decay and rate are the same, so nearly nothing."
    a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models.values())
    return ((a - b).norm()/a.norm()).item()


if __name__ == '__main__':
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--arch', default='resnet50')
    ask.add_argument('--device', default='cpu')
    ask.add_argument('--rounds', type=int, default=30)
    args = ask.parse_args()
    optimizers, models = contestants(args.arch, args.device)
    for optimizer in optimizers.values(): optimizer.step()
    if 'lightly' in models:
        import lightly
        difference = apart(models)
        assert difference < 1e-5, f'the two do not take the same first step: {difference}'
        beside = dict(lightly=lightly.__version__, first_step_apart=difference)
    else: beside = dict(left_out=dict(lightly='lightly is not installed'))
    ms = milliseconds(optimizers, args.device, args.rounds)
    ps = list(models['ours'].parameters())
    report = dict(arch=args.arch, device=args.device, threads=torch.get_num_threads(), torch=torch.__version__,
                  tensors=len(ps), no_decay=len(no_decay(models['ours'])), numbers=sum(p.numel() for p in ps),
                  rounds=args.rounds, ms=ms) | beside
    if 'lightly' in ms: report['ratio_time_lightly'] = round(ms['lightly']/ms['ours'], 3)
    print(json.dumps(report, indent=1))
