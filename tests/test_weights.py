"A run that starts from weights: they help, they are kept, and they are a baseline."
import timm, torch
import torch.nn.functional as F
import numpy as np, pytest
from PIL import Image
from sklearn.datasets import load_digits
from test_commands import refused, simclr, works

from simclr_nb.encoder import load_encoder
from simclr_nb.training.folder import read_json

pytestmark = pytest.mark.usefixtures('quick_figures')
network = 'resnet10t'
settings = ('--arch', f'timm:{network}', '--size', 32, '-b', 32, '--epochs', 1, '--optimizer', 'adam', '--lr', 1e-3,
            '--temperature', .2, '--num-workers', 0, '--knn-every', 0)


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "Two parts of the digits: images and classes of one, a folder of pictures of the other."
    folder, (x, y) = tmp_path_factory.mktemp('digits'), load_digits(return_X_y=True)
    x = np.kron(x.reshape(-1, 8, 8)/16, np.ones((4, 4))).astype(np.float32)
    for i in range(700, 1050):
        (folder/str(y[i])).mkdir(exist_ok=True)
        Image.fromarray((255*x[i]).astype(np.uint8)).convert('RGB').save(folder/str(y[i])/f'{i}.png')
    return torch.from_numpy(x[:700, None]).expand(-1, 3, -1, -1), torch.from_numpy(y[:700]), folder


@pytest.fixture(scope='module')
def weights(digits, tmp_path_factory):
    "A file of plain weights: a network of timm that has learned to tell digits, with its classifier."
    x, y, _ = digits
    torch.manual_seed(0)
    net = timm.create_model(network, num_classes=10)
    facts = net.pretrained_cfg
    mean, std = (torch.tensor(facts[k]).view(3, 1, 1) for k in ('mean', 'std'))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(5):
        for some in torch.randperm(len(x)).split(60):
            loss = F.cross_entropy(net((x[some] - mean)/std), y[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    path = tmp_path_factory.mktemp('weights')/'digits.pth'
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def runs(digits, weights, tmp_path_factory):
    "A run from random weights, and one from those."
    folder = tmp_path_factory.mktemp('runs')
    works(simclr('pretrain', digits[2], '--out', folder/'random', *settings))
    works(simclr('pretrain', digits[2], '--out', folder/'started', '--weights', weights, *settings))
    return folder


def neighbors(run, data, out):
    works(simclr('evaluate', run, data, '--protocol', 'knn', '--seeds', 0, '--num-workers', 0, '--out', out))
    scores = read_json(out/'report.json')['scores']
    return {s['encoder']: s['balanced_accuracy']['mean'] for s in scores}


def test_weights_raise_the_accuracy_of_the_start_and_of_the_result(digits, runs, tmp_path):
    random, started = (neighbors(runs/name, digits[2], tmp_path/name) for name in ('random', 'started'))
    assert 'start' not in random
    assert started['start'] > started['untrained'] + 5 and started['simclr'] > random['simclr'] + 5


def test_the_start_is_kept_and_known(weights, runs):
    start, end = (load_encoder(runs/'started'/name) for name in ('start.safetensors', 'encoder.safetensors'))
    given = torch.load(weights, weights_only=True)
    assert torch.equal(start.net.conv1[0].weight, given['conv1.0.weight'])
    assert not torch.equal(start.net.conv1[0].weight, end.net.conv1[0].weight)
    assert end.config['arch'] == f'timm:{network}' and end.config['normalize']['mean'][0] == .485


def test_only_the_head_learns_while_the_encoder_is_frozen(digits, weights, tmp_path):
    out = tmp_path/'frozen'
    works(simclr('pretrain', digits[2], '--out', out, '--weights', weights, '--freeze-epochs', 1, *settings))
    start, end = (load_encoder(out/name) for name in ('start.safetensors', 'encoder.safetensors'))
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters()))


def test_a_run_goes_on_without_the_file_that_it_began_with(digits, weights, tmp_path):
    file, out = tmp_path/'moved.pth', tmp_path/'run'
    file.write_bytes(weights.read_bytes())
    command = ('pretrain', digits[2], '--out', out, '--weights', file, *settings)
    works(simclr(*command))
    whole = load_encoder(out/'encoder.safetensors')
    for name in ('encoder.safetensors', 'head.safetensors', 'report.json'): (out/name).unlink()
    file.unlink()
    assert works(simclr(*command))
    again = load_encoder(out/'encoder.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize('more, words', [
    (('--weights', 'nothing.pth'), 'there are no weights nothing.pth'),
    (('--freeze-epochs', 1), 'give these'),
    (('--weights', 'timm:resnett18'), 'unknown encoder')])
def test_what_cannot_be_is_said_and_nothing_is_written(digits, more, words, tmp_path):
    refused(simclr('pretrain', digits[2], '--out', tmp_path/'run', *settings, *more), words)
    assert not (tmp_path/'run').exists()


def test_weights_of_another_network_are_named(digits, weights, tmp_path):
    other = [*settings]
    other[1] = 'resnet18_0.25x'
    refused(simclr('pretrain', digits[2], '--out', tmp_path/'run', '--weights', weights, *other), 'not in the network')
    assert not (tmp_path/'run').exists()
