"""What `save_encoder` keeps gives the same features after `load_encoder`: every network of
both libraries, with made weights.

The weights come the way that the libraries' own do, without the download: what a library sets for its weights alone,
and no file of weights holds, would show. By default one small network of each family; SIMCLR_TEST_LONG=1 takes all
of torchvision's networks, and the families of timm that have heavy ones only."""
import os
from contextlib import contextmanager
from unittest.mock import patch

import pytest, timm, torch, torch.nn.functional as F, torchvision
from torchvision.models import WeightsEnum

from simclr_nb.core import Undrawn, save_tensors
from simclr_nb.encoder import Normalized, load_encoder, save_encoder
from simclr_nb.weights.files import named_encoder

long = 'SIMCLR_TEST_LONG' in os.environ
pytestmark = pytest.mark.long


def fill(net, seed=0):
    "Weights and statistics unlike those of a new network, in which some branches are silent."
    g = torch.Generator().manual_seed(seed)
    for name, t in net.state_dict().items():
        if not t.is_floating_point(): continue
        if name.endswith(('bias', 'mean')): t.copy_(.1*torch.randn(t.shape, generator=g))
        elif t.ndim < 2: t.copy_(.5 + torch.rand(t.shape, generator=g))
        elif not t.any(): t.copy_(torch.randn(t.shape, generator=g)/t[0].numel()**.5)
    return net


def settle(net, x):
    "Statistics of these images, without which deep networks of made weights see no difference between images."
    norms = [m for m in net.modules() if getattr(m, 'running_mean', None) is not None]
    before = [m.momentum for m in norms]
    for m in norms: m.momentum = 1.
    with torch.no_grad(): net.train()(x)
    for m, momentum in zip(norms, before): m.momentum = momentum
    return net.eval()


@contextmanager
def made_weights(kind, name):
    "For timm and torchvision, weights that nobody has to download."
    if kind == 'timm':
        with patch('timm.models._builder.load_pretrained', lambda model, **_: fill(model)): yield
        return
    more = dict(init_weights=True) if name in ('googlenet', 'inception_v3') else {}
    def whole(weights, **_):
        side = dict(image_size=weights.meta['min_size'][0]) if name.startswith('vit_') else {}
        return fill(torchvision.models.get_model(name, **more, **side)).state_dict()
    with patch.object(WeightsEnum, 'get_state_dict', whole): yield


def built(word, sizes):
    "The encoder of the first size that the network takes, and that size; the error where it takes none."
    for size in sizes:
        try:
            with Undrawn(): return named_encoder(word, size=size), size
        except ValueError as e: error = e
    raise error


def round_trip(word, sizes, path):
    "The features before are the features after."
    kind, _, name = word.partition(':')
    with made_weights(kind, name), torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, size = built(word, sizes)
        coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        x = F.interpolate(coarse, size=(size, size), mode='bilinear')
        settle(encoder, x)
    with torch.no_grad(): h = encoder(x)
    assert h.shape == (4, encoder.num_features) and h.isfinite().all() and not torch.allclose(h[0], h[1], rtol=1e-4)
    again = load_encoder(save_encoder(encoder, path))
    path.unlink()
    with torch.no_grad(): assert torch.equal(again(x), h), (again(x) - h).abs().max()
    assert again.config == encoder.config and again.num_features == encoder.num_features


small = 'densenet121', 'legacy_seresnet18', 'levit_128s', 'tresnet_m', 'mobilenetv3_small_050', 'repvit_m0_9'
small += 'convnext_tiny', 'mobilenet_v3_small', 'regnet_y_400mf', 'resnet18', 'shufflenet_v2_x0_5', 'swin_t', 'vit_b_32'
heavy = {'beit_base_patch16_224', 'deepseek_vit_412m', 'gemma4_vit_167m', 'inception_resnet_v2', 'inception_v4',
         'mobilenetv5_300m', 'naflexvit_base_patch16_siglip', 'nasnetalarge', 'pnasnet5large', 'qwen3_vit_88m',
         'sam2_hiera_tiny', 'samvit_base_patch16', 'sequencer2d_s', 'vgg11'}    # seconds or gigabytes each


def families():
    "The smallest network of each of timm's families, as far as names tell; without the heavy ones if time matters."
    sizes = ('test_', 'zepto', 'atto', 'femto', 'pico', 'nano', 'xxt', 'xxs', 'tiny', '_t0', '_t_', 'mini', 'xs', '_t',
             'small', 'micro', '_s', '050', '035', '_b0', '_0', '18', '14', '26')
    def rank(name):
        size = next((i for i, s in enumerate(sizes) if s in name), len(sizes))
        return name not in small, size, len(name), name
    found = [timm.list_models(module=module) for module in timm.list_modules()]
    names = [min(family, key=rank) for family in found if family]
    return [name for name in names if long or name not in heavy]


def torchvision_names(every):
    "All of torchvision's classification models; or a small one of each of its modules."
    names, seen = torchvision.models.list_models(module=torchvision.models), {}
    for name in sorted(names, key=lambda name: name not in small):
        seen.setdefault(torchvision.models.get_model_builder(name).__module__, name)
    return names if every else list(seen.values())


refusals = ('cannot take images of shape', 'an encoder turns images', 'no linear classifier', 'cannot build')
refused = {'torchvision:squeezenet1_0', 'torchvision:squeezenet1_1'}


def sizes_for(word):
    "A small size, which most networks take, and the one that it was made for, where it does not take that."
    library, _, name = word.partition(':')
    if library == 'timm': native = timm.get_pretrained_cfg(name).input_size[-1]
    else: native = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    tied = word.startswith(('torchvision:vit', 'torchvision:maxvit', 'torchvision:swin'))
    return [native] if tied else [96, native]


def check(word, path):
    try: round_trip(word, sizes_for(word), path)
    except ValueError as e: assert word in refused and any(words in str(e) for words in refusals), (word, e)
    else: assert word not in refused


@pytest.mark.parametrize('name', torchvision_names(long))
def test_torchvision(name, tmp_path): check(f'torchvision:{name}', tmp_path/'encoder.safetensors')


@pytest.mark.parametrize('name', ['fbnetc_100', *families()])
def test_timm(name, tmp_path): check(f'timm:{name}', tmp_path/'encoder.safetensors')


@pytest.mark.parametrize('word', ['torchvision:googlenet', 'torchvision:inception_v3', 'timm:fbnetc_100'])
def test_settings_that_belong_to_weights_are_those_of_the_library(word):
    "The library's own network with its weights, called as its documentation says, is the oracle."
    library, _, name = word.partition(':')
    with made_weights(library, name), torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = named_encoder(word, size=96).eval()
        torch.manual_seed(0)
        if library == 'timm': net = timm.create_model(name, pretrained=True, num_classes=0)
        else:
            net = torchvision.models.get_model(name, weights='DEFAULT')
            net.fc = torch.nn.Identity()
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))
    with torch.no_grad(): h, want = encoder(x), net.eval()((x - mean)/std)
    torch.testing.assert_close(h, want, rtol=1e-4, atol=1e-5*want.abs().max().item())


def test_a_file_of_version_01_gets_the_setting_that_it_left_out(tmp_path):
    with made_weights('torchvision', 'googlenet'): net = torchvision.models.get_model('googlenet', weights='DEFAULT')
    net.fc = torch.nn.Identity()
    normalize = dict(mean=[.485, .456, .406], std=[.229, .224, .225])
    facts = dict(arch='torchvision/googlenet', size=96, stem=None, feature_dim=1024, normalize=normalize,
                 start='torchvision:googlenet', format=1, version='0.1.0')
    before = Normalized(net.eval(), 1024, normalize)                               # as 0.1 trained it
    path = save_tensors(tmp_path/'encoder.safetensors', before.state_dict(), simclr_nb=facts)
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): assert torch.equal(load_encoder(path)(x), before.eval()(x))
