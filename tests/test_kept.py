"What version 0.1 left behind is still read: its runs, its encoder files, and the same features come out."
import json, lzma, shutil
from pathlib import Path

import pytest, timm, torch
from safetensors.torch import load_file
from test_commands import simclr, works
from torch import nn
from torch.testing import assert_close

from simclr_nb.encoder import build_encoder, encoder_config, load_encoder, save_encoder
from simclr_nb.training.folder import read_json
from simclr_nb.training.history import read_history
from simclr_nb.training.resume import load_state
from simclr_nb.weights.files import load_head, named_encoder

kept = Path(__file__).parent/'kept'/'0.1'                # made by kept/make_01.py, with the code of 0.1
files = 'ours', 'own', 'timm', 'normalized', 'tied', 'channels'


@pytest.fixture(scope='module')
def values(): return load_file(kept/'features.safetensors')


@pytest.fixture(scope='module')
def run(tmp_path_factory): return shutil.copytree(kept, tmp_path_factory.mktemp('kept')/'0.1')/'run'


def unpacked(name, folder):
    path = folder/f'{name}.safetensors'
    path.write_bytes(lzma.decompress((kept/f'{name}.safetensors.xz').read_bytes()))
    return path


def own():
    layers = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)


def same(h, want): assert_close(h, want, rtol=1e-6, atol=1e-6*want.abs().max().item())


@pytest.mark.parametrize('name', files)
def test_an_encoder_file_gives_the_features_that_it_gave(name, values, tmp_path):
    path, x = unpacked(name, tmp_path), values['x']/255
    if name == 'channels': x = x[:, :1]
    encoder = load_encoder(path, own() if name == 'own' else None)
    with torch.no_grad(): same(encoder(x), values[name])
    again = save_encoder(encoder, tmp_path/'again.safetensors')
    assert load_file(again).keys() == load_file(path).keys()                      # the names that the tensors had
    with torch.no_grad(): same(load_encoder(again, own() if name == 'own' else None)(x), values[name])


def test_what_a_file_says_is_understood_in_todays_words(tmp_path):
    facts = {name: encoder_config(unpacked(name, tmp_path)) for name in files}
    assert [facts[n]['arch'] for n in files] == ['resnet18_0.03125x', None, *['timm:test_efficientnet']*2,
                                                 'timm:test_vit', 'timm:test_efficientnet']
    assert facts['ours']['source'] == 'nowhere' and facts['ours']['stem'] == 'small'
    normalize = {k: list(timm.get_pretrained_cfg('test_efficientnet').to_dict()[k]) for k in ('mean', 'std')}
    assert facts['normalized']['normalize'] == facts['channels']['normalize'] == normalize
    assert facts['channels']['channels'] == 1 and facts['channels']['pixels'] == dict(low=[0], high=[4095])


def test_a_run_is_read(run, values):
    encoder, x = named_encoder(run), values['x']/255
    head, state = load_head(run/'head.safetensors'), load_state(next((run/'checkpoints').glob('*.pt')))
    with torch.no_grad():
        h = encoder(x)
        same(h, values['run h'])
        same(head(h), values['run z'])
    model = {k.removeprefix('encoder.'): v for k, v in state['model'].items() if k.startswith('encoder.')}
    build_encoder('resnet18_0.03125x', 16).load_state_dict(model)                 # names in checkpoints, too
    assert all(torch.equal(v, model[k]) for k, v in encoder.state_dict().items())
    history, config = read_history(run/'history.csv'), read_json(run/'config.json')
    assert history['step'].tolist() == [1, 2, 3, 4, 4] and config['arch'] == 'resnet18_0.03125x'


def test_a_run_is_complete_and_not_trained_again(run):
    before = (run/'encoder.safetensors').read_bytes()
    settings = ('--arch resnet18_0.03125x --size 16 -b 8 --epochs 2 --lr 0.03 --optimizer sgd --num-workers 0 '
                '--projection-dim 16 --save-every 2 --knn-every 0').split()
    config = read_json(run/'config.json') | dict(source=str(run.parent/'images'))
    (run/'config.json').write_text(json.dumps(config))
    assert 'nothing to do' in works(simclr('pretrain', run.parent/'images', '--out', run, *settings))
    assert (run/'encoder.safetensors').read_bytes() == before


def test_a_run_is_evaluated(run):
    options = '--protocol', 'knn', '--seeds', '0', '--num-workers', '0'
    said = works(simclr('evaluate', run, run.parent/'images', *options))
    scores = {s['encoder'] for s in read_json(run/'report.json')['scores']}
    assert {'pixels', 'pca', 'untrained', 'simclr'} <= scores and 'simclr' in said
