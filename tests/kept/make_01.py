"""What version 0.1 left behind: a run, encoder files, and the features that 0.1 made with them.

Run once, with the code of version 0.1 (commit ac72aff) on the path: `PYTHONPATH=WORKTREE python tests/kept/make_01.py`.
The tests read the result, tests/kept/0.1. Weights are mostly zeros, so that the files stay small."""
import json, lzma, shutil
from pathlib import Path

import numpy as np, torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from simclr_nb import __version__, cli
from simclr_nb.channels import adapt_channels
from simclr_nb.encoder import build_encoder, load_encoder, save_encoder, set_encoder_info
from simclr_nb.projection import load_head
from simclr_nb.weights import pretrained

assert __version__ == '0.1.0'
here = Path(__file__).resolve().parent/'0.1'
work = here/'work'


def draw():
    "Sixteen pictures of two classes: stripes that lie and stripes that stand."
    rng = np.random.default_rng(0)
    for i in range(16):
        wave = np.sin(np.arange(16)*(.6 + .05*i) + i)
        field = np.broadcast_to(wave[:, None] if i % 2 else wave[None], (16, 16))
        color = rng.integers(40, 215, 3)
        pixels = (field[..., None]*30 + color).clip(0, 255).astype(np.uint8)//16*16
        file = here/'images'/('standing', 'lying')[i % 2]/f'{i:02}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


def sparse(net, seed):
    "Weights of which most are zero, and statistics that are not those of a new network."
    g = torch.Generator().manual_seed(seed)
    for name, t in net.state_dict().items():
        if not t.is_floating_point() or name in ('mean', 'std'): continue
        if t.ndim > 1:
            kept = torch.rand(t.shape, generator=g) < max(.04, min(.5, 6/t[0].numel()))
            t.copy_(kept*torch.randint(-2, 3, t.shape, generator=g)/2)
        elif 'var' in name or ('weight' in name): t.copy_(.5 + torch.randint(0, 4, t.shape, generator=g)/4)
        else: t.copy_(torch.randint(-2, 3, t.shape, generator=g)/8)
    return net.eval()


def own():
    layers = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)


def plain(name, seed):
    "A network of timm whose weights came from a file of plain weights."
    net = sparse(build_encoder(f'timm/{name}', 32), seed)
    save_file(net.state_dict(), work/'plain.safetensors')
    return pretrained(work/'plain.safetensors', name, 32).eval()


def encoders():
    yield 'ours', sparse(build_encoder('resnet18_0.03125x', 32, 'small'), 1), dict(source='nowhere')
    yield 'own', sparse(own(), 2), dict(size=32)
    yield 'timm', sparse(build_encoder('test_efficientnet', 32), 3), {}
    yield 'normalized', plain('test_efficientnet', 4), {}
    vit = sparse(build_encoder('timm/test_vit', 32), 5)
    yield 'tied', vit, {}
    gray = adapt_channels(plain('test_efficientnet', 6), 1)
    yield 'channels', set_encoder_info(gray, channels=1, pixels=dict(low=[0], high=[4095])), {}


shutil.rmtree(here, ignore_errors=True)
work.mkdir(parents=True)
draw()
torch.manual_seed(0)
x = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
values = dict(x=x)
with torch.no_grad():
    for name, encoder, facts in encoders():
        file = save_encoder(encoder, work/f'{name}.safetensors', **facts)
        again = load_encoder(file, own() if name == 'own' else None)
        values[name] = again(x[:, :1]/255 if name == 'channels' else x/255)
        with lzma.open(here/f'{name}.safetensors.xz', 'wb', preset=9) as f: f.write(file.read_bytes())
    settings = ('--arch resnet18_0.03125x --size 16 -b 8 --epochs 2 --lr 0.03 --optimizer sgd --num-workers 0 '
                '--projection-dim 16 '
                '--save-every 2 --knn-every 0').split()
    run = here/'run'
    with torch.enable_grad(): cli.main(['pretrain', str(here/'images'), '--out', str(run), *settings])
    values['run h'] = load_encoder(run/'encoder.safetensors')(x/255)
    values['run z'] = load_head(run/'head.safetensors').eval()(values['run h'])
save_file({k: v.contiguous() for k, v in values.items()}, here/'features.safetensors')
shutil.rmtree(work)
shutil.rmtree(run/'figures', ignore_errors=True)
config = json.loads((run/'config.json').read_text()) | dict(source='images')    # not a place on this machine
(run/'config.json').write_text(json.dumps(config, indent=1))
for state in sorted((run/'checkpoints').glob('*.pt'))[:-1]: state.unlink()
print({k: (tuple(v.shape), v.float().std(0).mean().item()) for k, v in values.items()})
